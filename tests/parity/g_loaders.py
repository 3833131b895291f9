"""G_loaders: the later records' document packing and shuffled windows, and where packed rows are cut."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paramgolf.data.loader import Loader, TokenStream
from paramgolf.data.orders import Packed, Place, ShuffledShards
from paramgolf.data.shards import open_shard, write_shard
from paramgolf.files import sha256_file
from paramgolf.model.documents import BOS_ID, bounds, segment_numbers
from tests.parity.harness import Check, exact


def boundaries(ids: np.ndarray, cut: int, room: int) -> tuple[list[int], int]:
    """(where the segments of a packed row begin and its end, filled up to `room` numbers; the longest segment)."""
    ends = bounds(segment_numbers(torch.from_numpy(ids.astype(np.int64))[None], cut))
    return ends + ends[-1:] * (room - len(ends)), int(np.diff(ends).max())


def check_cuts(z: Any) -> list[Check]:
    checks = []
    for number, case in enumerate(json.loads(str(z["cu_cases_json"]))):
        ids = np.full(case["total"], BOS_ID + 1)
        ids[case["bos"]] = BOS_ID
        bucket = case["bucket"]
        ours = boundaries(ids, case["max_doc_len"], -(-len(case["cu"]) // bucket) * bucket)
        checks.append(exact(f"cuts {number}", [*ours[0], ours[1]], [*case["cu"], case["max_seqlen"]]))
    return checks


def check_packing(at: str, z: Any, shards: list[np.memmap], world: int, accumulation: int, rank: int) -> list[Check]:
    config = json.loads(str(z["config_json"]))
    x, y = z[f"{at}/x"], z[f"{at}/y"]
    length, stream = x.shape[1], TokenStream(shards)
    spans = world * accumulation
    # One batch of the order is one call of every rank of the published loader.
    order = Packed(shards, length, world, None, group=world)
    place, starts = Place(length, length * world), []
    while len(starts) < len(x):
        rows, place = order.take(place)
        starts.append(int(rows[rank]))
    tokens = np.stack([stream.read(start, length + 1) for start in starts])
    checks = [
        exact(f"{at} tokens a row", length, config["tokens"] // spans),
        exact(f"{at} x", tokens[:, :-1], x),
        exact(f"{at} y", tokens[:, 1:], y),
    ]
    reference = json.loads(str(z[f"{at}/cu_json"]))
    cuts = [boundaries(row, config["seq"], len(cu)) for row, cu in zip(tokens[:, :-1], reference, strict=True)]
    wrong = sum(ours != cu for (ours, _), cu in zip(cuts, reference, strict=True))
    longest = [int(most) for _, most in cuts]
    return [*checks, Check(f"{at} cu", float(wrong), 0.0), exact(f"{at} longest", longest, z[f"{at}/max_seqlen"])]


def check_shuffled(at: str, z: Any, shards: list[np.memmap], world: int, rank: int) -> list[Check]:
    x, y = z[f"{at}/x"], z[f"{at}/y"]
    count, rows, seq_len = x.shape
    own = shards[rank::world]
    loader = Loader(own, seq_len=seq_len, batch_tokens=rows * seq_len, seed=rank, order="shuffled_shards")
    got = [loader.next_batch() for _ in range(count)]
    loader.close()
    order = ShuffledShards([len(shard) for shard in own], seq_len, rows * seq_len, rank)
    order.begin(0)
    first = json.loads(str(z[f"{at}/initial_start_order_json"]))
    return [
        exact(f"{at} x", torch.stack([pair[0] for pair in got]).numpy(), x),
        exact(f"{at} y", torch.stack([pair[1] for pair in got]).numpy(), y),
        Check(f"{at} first order", float(order.left != first), 0.0),
    ]


def check(path: Path, z: Any) -> list[Check]:
    checks = check_cuts(z)
    names = sorted((n for n in z.files if re.fullmatch(r"shard\d+", n)), key=lambda n: int(n[5:]))
    with tempfile.TemporaryDirectory() as folder:
        shards = []
        for name in names:
            file = Path(folder, f"{name}.bin")
            write_shard(file, z[name])
            checks.append(Check(f"{name} file", float(sha256_file(file) != str(z[f"{name}_sha256"])), 0.0))
            shards.append(open_shard(file))
        for key in (k for k in z.files if k.endswith("/x")):
            kind, layout, rank_name, _ = key.split("/")
            world, accumulation = (int(n) for n in re.findall(r"\d+", layout))
            at, rank = key.removesuffix("/x"), int(rank_name.removeprefix("rank"))
            if kind == "packing":
                checks += check_packing(at, z, shards, world, accumulation, rank)
            else:
                checks += check_shuffled(at, z, shards, world, rank)
        del shards
    return checks
