"""The calls that the fused kernels serve."""

import torch

from dape.attention.call import Call, transform
from dape.attention.fused.sizes import next_power_of_2, padded
from dape.attention.fused.tables import hidden_units
from dape.attention.fused.tables import obstacle as table_obstacle
from dape.positions.bias import FIRE

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDEST_HEAD, MOST_HEADS, MOST_UNITS = 128, 32, 64
# Taps of a convolution times heads or units, all padded; half as many in float32.
MOST_CHANNELS = 256
# Rows of a band at least: `geometry.ALIGNMENT`.
FEWEST_ROWS = 64
# CUDA's limit of a grid along the second axis, for the heads of a batch.
MOST_PROGRAMS = 65535
# Of a module, for its calls.
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
# Capabilities with more than 160 KiB of shared memory for a block: A100, H100, B200 and B300.
LARGE = ((8, 0), (9, 0), (10, 0), (10, 3))


def obstacle(call: Call) -> str | None:
    """Return why the fused kernels cannot serve a call, or None."""
    query, value, mask, shift = call.query, call.value, call.mask, call.shift
    if (around := transform()) is not None:
        return f"the kernels know no {around}"
    if call.positioned:
        return "positions are given, and the kernels count indices"
    if query.dtype == torch.bfloat16 and query.device.type == "cpu":
        return "Triton's interpreter multiplies no bfloat16"
    if not isinstance(shift, int):
        return "query_offset is a tensor"
    if mask is not None and mask.shape[2] > 1:
        return "the mask differs between queries"
    if query.dtype not in DTYPES:
        return f"the dtype is {query.dtype}"
    if query.dtype != value.dtype:
        return f"the query is {query.dtype}, but the value {value.dtype}"
    widest = max(query.shape[3], value.shape[3])
    if widest > WIDEST_HEAD:
        return f"head_dim={widest} is more than {WIDEST_HEAD}"
    return size_obstacle(call) or table_obstacle(call.bias, call.adapter) or uncalled(call)


def uncalled(call: Call) -> str | None:
    """Return which module would compute otherwise if it were called, or None.

    The kernels read parameters without a call of the module. A call runs hooks, as those of
    `torch.nn.utils.weight_norm` and `prune`, which set the weights. Accelerate moves an offloaded
    parameter to the device in a call.
    """
    device = call.query.device
    for module in (call.bias, call.adapter):
        if not isinstance(module, torch.nn.Module):
            continue
        name = type(module).__name__
        if any([getattr(module, hooks) for hooks in _HOOKS]):
            return f"{name} has hooks, and the kernels call no module"
        for parameter in module.parameters():
            if parameter.device != device:
                return f"a parameter of {name} is on {parameter.device}, and the query on {device}"
    return None


def size_obstacle(call: Call) -> str | None:
    """Return why there are too many heads or hidden units, or None."""
    query, bias, adapter = call.query, call.bias, call.adapter
    batch, heads, units = *query.shape[:2], hidden_units(adapter)
    most = max(units, len(bias.bias_in)) if isinstance(bias, FIRE) else units
    if heads > MOST_HEADS:
        return f"{heads} heads are more than {MOST_HEADS}"
    if batch * heads > MOST_PROGRAMS:
        return f"batch * heads is more than {MOST_PROGRAMS}"
    if most > MOST_UNITS:
        return f"hidden={most} is more than {MOST_UNITS}"
    if heads > 16 and units > 32 and is_small(query.device):
        return f"{heads} heads and hidden={units} need more shared memory than it has"
    taps = getattr(adapter, "kernel_size", 1)
    if taps == 1:
        if call.halo == (0, 0):
            return None
        return f"halo={call.halo} is for DAPE V2, whose kernels look at neighbouring keys"
    channels = next_power_of_2(taps) * padded(max(heads, units))
    most = MOST_CHANNELS // (2 if query.dtype == torch.float32 else 1)
    if channels <= most:
        return None
    return (
        f"kernel_size={taps} with {heads} heads and hidden={units} needs {channels} padded "
        f"channels, more than {most}"
    )


def cuda_obstacle(call: Call) -> str | None:
    """Return why kernels in CUDA cannot mix the heads of a call, or None.

    Calls of FIRE and of DAPE V2 that have no kernels in CUDA are mixed in Triton.
    """
    adapter = call.adapter
    if adapter is None or isinstance(call.bias, FIRE) or getattr(adapter, "kernel_size", 1) > 1:
        return None
    from dape.attention.fused.cuda import mix

    if call.query.dtype == torch.float32:
        return "its scratch is fp16, too narrow for float32"
    _, heads, rows, size = call.query.shape
    keys = call.key.shape[2]
    if heads * max(FEWEST_ROWS * keys, max(rows, keys) * size) >= 2**31:
        return f"{heads} heads of {max(rows, keys)} tokens are more than 32 bits count"
    return mix.obstacle(call.query.shape[1], hidden_units(adapter))


def is_small(device: torch.device) -> bool:
    """Return whether a GPU has less shared memory than the widest float32 tiles take, 132 KiB."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) not in LARGE
