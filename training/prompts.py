"""Instructions as training says them: the one that is used when serving, and others that mean it.

SparQLe's second stage draws one of a few paraphrases for every item (Djanibekov and Aldarmaki,
2025), so that the LLM follows the meaning and not one string.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparqle_stream.tasks import LANGUAGES, instruction

if TYPE_CHECKING:
    import random

P_SERVED = 0.6
OTHERS = {
    "translate": ("In {to}, this means:", "Say it in {to}:", "{to} translation:"),
    "answer": ("Reply to the question:", "What is the answer?", "Answer in a few words:"),
}


def draw_instruction(task: str, rng: random.Random) -> str:
    """The instruction of 'transcribe' (''), 'translate to de', 'answer', or a paraphrase of it."""
    kind, _, to = task.partition(" to ")
    if kind not in OTHERS or rng.random() < P_SERVED:
        return instruction(task)
    return rng.choice(OTHERS[kind]).format(to=LANGUAGES.get(to, ""))
