"""What a table of published settings can ask for: a schedule, adapters."""

import math

import pytest
import torch
from transformers import get_inverse_sqrt_schedule

import common
import cpo
import dpo


def test_inverse_square_root_is_that_of_transformers():
    """Ours rises to the full rate in the last step of the warm-up, theirs one step later."""
    total, warmup = 200, 10
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_inverse_sqrt_schedule(optimizer, num_warmup_steps=warmup).lr_lambdas[0]
    ours = [common.schedule_factor("inverse-sqrt", warmup / total, i, total) for i in range(total)]
    assert ours == pytest.approx([theirs(i + 1) for i in range(total)])
    assert max(ours) == ours[warmup - 1] == 1.0
    assert ours[4 * warmup - 1] == pytest.approx(1 / 2)  # four times as far, half the rate


def test_inverse_square_root_without_a_warm_up():
    """As if one of 10,000 steps lay behind."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_inverse_sqrt_schedule(optimizer, num_warmup_steps=0).lr_lambdas[0]
    ours = [common.schedule_factor("inverse-sqrt", 0.0, i, 50) for i in range(50)]
    assert ours == pytest.approx([theirs(i + 1) for i in range(50)])
    assert ours[49] == pytest.approx(1 / math.sqrt(10_050 / 10_000))


@pytest.mark.parametrize(
    "asked, model, rank, origin",
    [
        (None, "alma-13b", 16, "alma-13b: "),  # published for adapters
        (None, "gemma-2-2b", 0, "default"),
        (0, "gemma-2-2b", 0, "default"),  # says what is so anyway: the folder's name stays
        (0, "alma-13b", 0, "command line"),
        (4, "alma-13b", 4, "command line"),
    ],
)
def test_adapters_can_be_a_published_setting(asked, model, rank, origin):
    args = cpo.Args(model=model, lora_rank=asked)
    where, _ = common.fill_in(args, cpo.SETTINGS)
    assert args.lora_rank == rank
    assert where["lora_rank"].startswith(origin)


def test_a_method_without_adapters_in_its_table_trains_all_weights():
    args = dpo.Args()
    common.fill_in(args, dpo.SETTINGS)
    assert args.lora_rank == 0
