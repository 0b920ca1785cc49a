"""The host's cost of a call: its launches. It never waits for the device."""

import pytest
import torch
from running import DEVICE, operator_calls, record_launches
from torch.utils._python_dispatch import TorchDispatchMode

from lsg_attn import SPARSITY_TYPES, LSGPattern, lsg_attention
from lsg_attn.testing import Inputs, make_inputs

LAUNCHES = {"none": 1, "stride": 1, "block_stride": 1, "norm": 2, "pooling": 2, "bos_pooling": 2, "lsh": 2}
READ = "aten::_local_scalar_dense"  # of item(), int() and the like
# Operators that neither run on a device nor wait for one.
FREE = {
    "aten::new_empty",
    "aten::empty",
    "aten::empty_like",
    "aten::select.int",
    "aten::transpose.int",
    "aten::detach",
    "aten::alias",
}


class Recorder(TorchDispatchMode):
    """The names of the operators that PyTorch runs."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that a call launches. The kernels do not run."""
    return record_launches(monkeypatch)


@pytest.mark.parametrize(("num_globals", "dropout_p"), [(0, 0.0), (3, 0.0), (3, 0.1)])
@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_operator_launches_few_kernels_and_never_waits(sparsity_type, num_globals, dropout_p, launched):
    """A forward launches at most three: a compression, the attention, a combine of the global queries.

    A backward launches at most six: the slots' rows again, sums, slots, weights, the gradients, a combine. PyTorch
    itself runs nothing.
    """
    pattern = LSGPattern(16, 16, 4, sparsity_type, num_globals)
    inputs = Inputs(*(x.to(DEVICE) for x in make_inputs(2, 4, num_globals + 90, 16)))
    seed = torch.tensor(5) if dropout_p else None  # on the CPU: reading it waits for no device
    forward, backward = operator_calls(inputs, pattern, inputs.attention_mask[:, num_globals:], seed, dropout_p)
    results = forward()  # lsh's directions are drawn once
    launched.clear()
    with torch._C.DisableTorchFunction(), Recorder() as recorder:  # ttsem fills new memory by such a function
        forward()
    assert len(launched) == LAUNCHES[sparsity_type] + (num_globals > 0) <= 3
    assert launched[-1 - (num_globals > 0)] == "_lsg_fwd_kernel"
    launched.clear()
    with torch._C.DisableTorchFunction(), recorder:
        backward(results)
    again = {"pooling": "_lsg_pool_kernel", "bos_pooling": "_lsg_pool_kernel", "lsh": "_lsg_lsh_kernel"}
    expected = [again[sparsity_type]] if sparsity_type in again else []
    expected += ["_lsg_bwd_sums_kernel"]
    expected += ["_lsg_bwd_slots_kernel"] * (sparsity_type != "none")
    expected += ["_lsg_bwd_weights_kernel"] * (sparsity_type == "bos_pooling")
    expected += ["_lsg_bwd_dq_dkv_kernel"]
    expected += ["_lsg_bwd_combine_kernel"] * (num_globals > 0 or sparsity_type == "bos_pooling")
    assert launched == expected
    assert recorder.names.count(READ) == 2 * (seed is not None)
    assert set(recorder.names) - {READ} <= FREE


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_lsg_attention_runs_only_the_operator(dropout_p, launched):
    """With dropout it also draws a seed, on the CPU."""
    inputs = [x.to(DEVICE) for x in make_inputs(2, 4, 1 + 90, 16)]
    with Recorder() as recorder:
        lsg_attention(*inputs[:3], LSGPattern(16, 16, 4), inputs[4], dropout_p, implementation="triton")
    assert recorder.names == ["aten::randint"] * (dropout_p > 0) + ["lsg_attn::attention"]
