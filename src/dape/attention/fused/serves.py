"""The calls that the fused kernels serve."""

import torch

from dape.attention.call import Call
from dape.attention.fused.tables import hidden_units
from dape.attention.fused.tables import obstacle as table_obstacle
from dape.positions.bias import FIRE

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDEST_HEAD, MOST_HEADS, MOST_UNITS = 128, 32, 64
# Taps of a convolution times heads or units, all padded; half as many in float32.
MOST_CHANNELS = 256
# CUDA's limit of a grid along the second axis, for the heads of a batch.
MOST_PROGRAMS = 65535
# Capabilities with more than 160 KiB of shared memory for a block: A100, H100, B200 and B300.
LARGE = ((8, 0), (9, 0), (10, 0), (10, 3))


def obstacle(call: Call) -> str | None:
    """Return why the fused kernels cannot serve a call, or None."""
    query, value, bias, adapter, mask = call[0], call.value, call.bias, call.adapter, call.mask
    batch, heads, units = *query.shape[:2], hidden_units(adapter)
    taps = getattr(adapter, "kernel_size", 1)
    channels = (1 << (taps - 1).bit_length()) * (1 << (max(16, heads, units) - 1).bit_length())
    most_channels = MOST_CHANNELS // (2 if query.dtype == torch.float32 else 1)
    features = len(bias.bias_in) if isinstance(bias, FIRE) else 0
    most, widest = max(units, features), max(query.shape[3], value.shape[3])
    reasons = [
        (call.positioned, "positions are given, and the kernels count indices"),
        (
            query.dtype == torch.bfloat16 and query.device.type == "cpu",
            "Triton's interpreter multiplies no bfloat16",
        ),
        (not isinstance(call.shift, int), "query_offset is a tensor"),
        (mask is not None and mask.shape[2] > 1, "the mask differs between queries"),
        (query.dtype not in DTYPES, f"the dtype is {query.dtype}"),
        (query.dtype != value.dtype, f"the query is {query.dtype}, but the value {value.dtype}"),
        (widest > WIDEST_HEAD, f"head_dim={widest} is more than {WIDEST_HEAD}"),
        (heads > MOST_HEADS, f"{heads} heads are more than {MOST_HEADS}"),
        (batch * heads > MOST_PROGRAMS, f"batch * heads is more than {MOST_PROGRAMS}"),
        (most > MOST_UNITS, f"hidden={most} is more than {MOST_UNITS}"),
        (
            taps > 1 and channels > most_channels,
            f"kernel_size={taps} with {heads} heads and hidden={units} needs {channels} padded "
            f"channels, more than {most_channels}",
        ),
        (
            heads > 16 and units > 32 and is_small(query.device),
            f"{heads} heads and hidden={units} need more shared memory than it has",
        ),
        (
            call.halo != (0, 0) and taps == 1,
            f"halo={call.halo} is for DAPE V2, whose kernels look at neighbouring keys",
        ),
    ]
    found = next((reason for holds, reason in reasons if holds), None)
    return found or table_obstacle(bias, adapter)


def cuda_obstacle(call: Call) -> str | None:
    """Return why kernels in CUDA cannot mix the heads of a call, or None.

    FIRE and DAPE V2 are mixed in Triton.
    """
    adapter = call.adapter
    if adapter is None or isinstance(call.bias, FIRE) or getattr(adapter, "kernel_size", 1) > 1:
        return None
    from dape.attention.fused.cuda import mix

    if call.query.dtype == torch.float32:
        return "its scratch is fp16, too narrow for float32"
    return mix.obstacle(call.query.shape[1], hidden_units(adapter))


def is_small(device: torch.device) -> bool:
    """Return whether a GPU has less shared memory than the widest float32 tiles take, 132 KiB."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) not in LARGE
