"""The stages as ONNX graphs, and ONNX Runtime as what computes them: the engine of CPUs.

`graphs` and `graph` build the graphs from the weights of the torch modules, `export` writes them
into a folder, `model` reads one, `stages` runs them for the engine. Nothing here imports torch but
`export`, which needs the weights. What each graph takes and gives stands in docs/onnx.md.
"""
