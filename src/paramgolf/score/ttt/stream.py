"""A token stream to bytes and back with a model that learns on the way: encoder and decoder make the same updates.

Every batch of documents is one coded stream, a document a lane. Both sides go chunk by chunk: the encoder codes a chunk
with the logits of its whole window, the decoder reads it token by token with a KV cache; then both run the very same
pass over the same tokens and learn from it. The first token of a document is given, the begin-of-document token; its
end is coded as the next one's. The lengths of all documents come first.

Only in stream order, and on one machine with one thread: updates that differ in the last digits would drift apart.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from paramgolf.errors import GolfError
from paramgolf.model.cache import KVCache
from paramgolf.model.gpt import GPT
from paramgolf.recipe.sections import TiltSection, TttSection
from paramgolf.score import coder
from paramgolf.score.tilt import NO_HINT, hints, tilt_logits
from paramgolf.score.ttt.adapt import Adaptation, adapting
from paramgolf.score.ttt.documents import Document, documents_of
from paramgolf.score.ttt.group import Chunk, Group
from paramgolf.score.ttt.settings import settings_of

Progress = Callable[[int, int], None]
MAX_SETTINGS = 1 << 14
MAX_DOCUMENTS = 1 << 24


def check_codable(section: TttSection, tilt: TiltSection, tokens: np.ndarray, bos_id: int) -> None:
    """GolfError for what a decoder could not follow."""
    if section.kind not in ("lora", "phased"):
        raise GolfError(f"ttt.kind={section.kind} cannot be proved; choose lora or phased")
    if section.order != "stream":
        raise GolfError(f"ttt.order={section.order} cannot be proved: a decoder reads from left to right; use stream")
    if tilt.orders:
        raise GolfError("the n-gram tilt cannot be proved together with test-time training; set tilt.orders=[]")
    if len(tokens) < 2 or tokens[0] != bos_id:
        raise GolfError("the tokens do not begin with a document start; such a stream cannot be proved")
