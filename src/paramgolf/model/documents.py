"""Documents inside a row of tokens: where one begins, and the forms in which attention kernels want to know.

Suffixes: B rows, T time, S key positions, N = B x T.
"""

from __future__ import annotations

import torch
from torch import Tensor

BOS_ID = 1  # begins every document


def segment_numbers(ids_BT: Tensor, cut: int = 0) -> Tensor:
    """(B, T) int32: the number of each position's segment in its row, from 0, never falling.

    A segment begins at the row's start and at every begin-of-document token, and with `cut` also every so many tokens
    after its beginning (the packed rows of #1530 to #1855, whose documents are cut at the training length).
    """
    starts_BT = ids_BT == BOS_ID
    starts_BT[:, :1] = True
    if cut:
        position_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        begin_BT = torch.where(starts_BT, position_T, 0).cummax(1).values
        starts_BT = (position_T - begin_BT) % cut == 0
    return (starts_BT.cumsum(1) - 1).to(torch.int32)


def continued(ids_BT: Tensor, last_B: Tensor | None) -> Tensor:
    """(B, T) int32 segment numbers of tokens that continue rows whose last position was in segment `last_B`."""
    numbers_BT = (ids_BT == BOS_ID).cumsum(1).to(torch.int32)
    return numbers_BT if last_B is None else numbers_BT + last_B.unsqueeze(1)


def causal_mask(length: int, span: int, device: torch.device) -> Tensor:
    """(T, S) bool, true where query t, the (S - T + t)-th position, may look."""
    past = span - length
    return torch.ones(length, span, dtype=torch.bool, device=device).tril(past)


def dense_mask(segments_BS: Tensor, length: int) -> Tensor:
    """(B, 1, T, S) bool for the last `length` of S positions: causal, and nothing of another segment."""
    span = segments_BS.shape[1]
    same = segments_BS[:, span - length :, None] == segments_BS[:, None, :]
    return (same & causal_mask(length, span, segments_BS.device)).unsqueeze(1)


def first_keys(segments_BT: Tensor) -> Tensor:
    """(B, T) int32: where in its row the segment of each position begins, the first key that its query sees."""
    flags_BT = first_flags(segments_BT).view(segments_BT.shape)
    position_T = torch.arange(segments_BT.shape[1], dtype=torch.int32, device=segments_BT.device)
    return torch.where(flags_BT, position_T, 0).cummax(1).values.to(torch.int32)


def first_flags(segments_BT: Tensor) -> Tensor:
    """(N,) bool over the flattened rows, true where a segment begins."""
    flags_BT = torch.ones_like(segments_BT, dtype=torch.bool)
    flags_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    return flags_BT.flatten()


def bounds(segments_BT: Tensor) -> list[int]:
    """Where segments begin in the flattened rows, and N at the end; waits for the device."""
    return [*first_flags(segments_BT).nonzero().flatten().tolist(), segments_BT.numel()]


def cumulative_lengths(segments_BT: Tensor, room: int) -> Tensor:
    """(room + 1,) int32 `cu_seqlens` of the flattened rows, filled up with N: its size does not depend on the data.

    More than `room` segments are an error (on a GPU of the device, without waiting for it).
    """
    flags_N = first_flags(segments_BT)
    torch._assert_async(flags_N.sum() <= room)
    places = torch.nonzero_static(flags_N, size=room + 1, fill_value=flags_N.numel())
    return places.flatten().to(torch.int32)


def room_for(count: int) -> int:
    """A size for `count` segments: a power of two from 64, so that few sizes occur."""
    return max(64, 1 << (count - 1).bit_length())
