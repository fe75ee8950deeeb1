"""The arguments of grow(), by place and by name, and what its receipt counts."""

import pytest
import torch

from nanostack import growth
from nanostack.errors import UserError
from nanostack.growth import Growth
from nanostack.growth.traffic import HostTraffic
from nanostack.model import Llama, LlamaConfig

CONFIG = LlamaConfig(n_layer=2, n_head=2, n_kv_head=1, d_model=8, d_ff=8, vocab_size=8, seq_len=4)


@pytest.mark.parametrize(
    ("places", "fields", "error", "message"),
    [
        (("stack", 2.0), {}, UserError, "g must be a whole number of 2 or more, not 2.0"),
        (("stack", "4"), {}, UserError, "g must be a whole number"),
        ((Growth(g=2), 4), {}, TypeError, "hooks are Hooks, not 4"),
        ((Growth(g=2),), {"g": 3}, TypeError, "g would change: dataclasses.replace does"),
        (("stack",), {"op": "zero"}, TypeError, "op is given twice"),
        ((None, 2), {"g": 2}, TypeError, "g is given twice"),
        ((), {"op": "stack", "g": 4, "hooks": {}}, TypeError, "hooks are Hooks, not {}"),
        (({"op": "stack"},), {}, TypeError, "how is a Growth or str, not {'op': 'stack'}"),
        (("stack",), {"moments": "reset"}, TypeError, "moments is a Moments, not 'reset'"),
        ((), {"wider": "split"}, TypeError, "wider is a Width, not 'split'"),
        ((), {"write": torch.Tensor.copy_}, TypeError, r"write belongs to hooks=Hooks\(...\)"),
    ],
)
def test_arguments_that_do_not_fit_together_are_refused_before_anything_is_touched(places, fields, error, message):
    model = Llama(CONFIG)
    with pytest.raises(error, match=message):
        growth.grow(model, None, *places, **fields)
    assert len(model.blocks) == 2


def test_op_g_and_layers_may_come_in_their_places():
    for places, layers in (
        (("stack", 2), [0, 1, 0, 1]),
        ((None, None, "0,1*3"), [0, 1, 1, 1]),
        ((Growth("interleave", 2), growth.Hooks()), [0, 0, 1, 1]),
        ((), [0, 1] * 4),
    ):
        assert growth.grow(Llama(CONFIG), None, *places)["layers"] == layers


def test_traffic_between_host_and_device_is_counted():
    """The meta device stands for a GPU: what goes there and comes from there crosses the same border."""
    numbers, there = torch.ones(4), torch.empty(8, device="meta")
    with HostTraffic() as traffic:
        numbers.clone().copy_(torch.zeros(4))
        assert traffic.bytes == 0
        numbers.to("meta")
        assert traffic.bytes == 16
        there[:4].copy_(numbers)
        assert traffic.bytes == 32
    detour = growth.Hooks(write=lambda parameter, value: (value.to("meta"), parameter.copy_(value)))
    model = Llama(CONFIG)
    receipt = growth.grow(model, None, Growth("random", 2), detour)
    assert receipt.bytes_through_host == sum(p.nbytes for block in model.blocks[2:] for p in block.parameters())
