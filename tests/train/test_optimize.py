import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from dape import DapeConfig, DapeForCausalLM
from dape.train.optimize import adamw, learning_rate
from dape.train.sections import Optimizer


def model(scheme="dape-kerple"):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return DapeForCausalLM(DapeConfig(scheme=scheme, vocab_size=50, **sizes))


@pytest.mark.parametrize("warmup", [10, 1])
def test_the_schedule_is_that_of_torch(warmup):
    settings = Optimizer(learning_rate=0.5, warmup=warmup / 100, final=0.1)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = CosineAnnealingLR(optimizer, T_max=100 - warmup, eta_min=0.05)
    if warmup > 1:
        rise = LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup - 1)
        schedule = SequentialLR(optimizer, [rise, schedule], milestones=[warmup - 1])
    expected = []
    for _ in range(100):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    rates = [learning_rate(step, 100, settings) for step in range(1, 101)]
    assert rates == pytest.approx(expected, rel=1e-12)


def test_the_schedule_of_the_paper():
    rates = [learning_rate(step, 50_000, Optimizer()) for step in (1, 500, 25_250, 50_000)]
    assert rates == pytest.approx([6e-4 / 500, 6e-4, (6e-4 + 6e-5) / 2, 6e-5], rel=1e-12)


def test_a_fraction_of_the_updates_is_rounded_to_the_nearest():
    settings = Optimizer(learning_rate=1.0, warmup=0.29)
    assert 0.29 * 100 < 29
    rates = [learning_rate(step, 100, settings) for step in (28, 29, 30)]
    assert rates[:2] == pytest.approx([28 / 29, 1.0]) and rates[2] < 1


def test_without_warm_up_the_first_update_is_on_the_cosine():
    settings = Optimizer(learning_rate=1.0, warmup=0.0, final=0.0)
    rates = [learning_rate(step, 2, settings) for step in (1, 2)]
    assert rates == pytest.approx([0.5, 0.0])
    assert learning_rate(3, 3, Optimizer(learning_rate=1.0, warmup=1.0)) == 1.0


def test_the_constant_schedule_stays_at_the_peak():
    settings = Optimizer(learning_rate=0.5, warmup=0.04, schedule="constant", final=0.1)
    rates = [learning_rate(step, 100, settings) for step in range(1, 101)]
    assert rates == pytest.approx([0.125, 0.25, 0.375] + 97 * [0.5])


@pytest.mark.parametrize("scheme", ["dape-kerple", "t5", "learned", "transformer-xl"])
def test_matrices_decay_and_nothing_else(scheme):
    module = model(scheme)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer = adamw(module, Optimizer(learning_rate=0.1, weight_decay=0.5))
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    layer = "model.layers.0."
    linear = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    linear += ["mlp.up_proj", "mlp.down_proj"]
    matrices = {f"{layer}{name}.weight" for name in linear}
    matrices |= {"model.embed_tokens.weight", "lm_head.weight"}
    for name, parameter in module.named_parameters():
        kept = 1 - 0.1 * 0.5 if name in matrices else 1
        torch.testing.assert_close(parameter, before[name] * kept, rtol=1e-6, atol=0)
    assert set(before) - matrices, "or nothing is left as it was"


def test_the_update_is_adams():
    module = model("kerple")
    settings = Optimizer(learning_rate=0.01, betas=(0.7, 0.8), eps=1e-3, weight_decay=0.0)
    weight = module.lm_head.weight
    before = weight.detach().double()
    first, second = (torch.randn(weight.shape).double() for _ in range(2))
    optimizer = adamw(module, settings)
    for gradient in (first, second):
        weight.grad = gradient.float()
        optimizer.step()
    step = first / ((first**2).sqrt() + 1e-3)
    mean = (0.7 * 0.3 * first + 0.3 * second) / (1 - 0.7**2)
    variance = (0.8 * 0.2 * first**2 + 0.2 * second**2) / (1 - 0.8**2)
    step += mean / (variance.sqrt() + 1e-3)
    torch.testing.assert_close(weight.double(), before - 0.01 * step, rtol=1e-6, atol=1e-7)
