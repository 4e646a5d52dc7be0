"""What an optimizer says of itself: before its first step whatever can be known, and how many steps it took."""

import copy
from itertools import takewhile

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import shardopt
from shardopt import Recipe, ShardedOptimizer, rules
from tests.small import train
from tests.threaded import run_threaded


def plan_of(text):
    """The lines of the plan, from its summary on."""
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("whole matrices"))
    return lines[first + 1 : -1]


def test_the_plan_is_told_before_the_first_step():
    """By one rank alone, and it is the plan that the step follows. Kills: a plan only once a step was taken, a report
    that compares plans between ranks, shards and replicas exchanged, frozen parameters planned for."""

    def body(rank):
        mesh = init_device_mesh("cpu", (2, 3), mesh_dim_names=("replicas", "shards"))
        made = torch.Generator().manual_seed(0)
        placements = [Replicate(), Shard(0)]
        shapes = [(64, 96), (33, 20), (64, 96), (40, 40)]
        ps = [nn.Parameter(distribute_tensor(torch.randn(s, generator=made), mesh, placements)) for s in shapes]
        ps[3].requires_grad_(False)
        opt = shardopt.Muon(ps, orthogonalizer="gram", mode="auto")
        before = opt.explain() if rank == 4 else None
        for p in ps[:3]:
            p.grad = distribute_tensor(torch.randn(p.shape, generator=made), mesh, placements)
        opt.step()
        return before, opt.explain()

    before, after = run_threaded(6, body)[4]
    assert "if every parameter that requires a gradient gets one" in before and "if every" not in after
    assert plan_of(before) == plan_of(after) and "on 3 shards x 2 replicas" in before


def test_what_will_run_is_told_before_the_first_step():
    """With the dtype that is assumed of gradients. Kills: an assumption that is not said, meta taken for a device."""
    p, q = nn.Parameter(torch.ones(8, 8).bfloat16()), nn.Parameter(torch.ones(8).bfloat16())
    q.grad_dtype = torch.float32
    text = shardopt.AdamW([p, q]).explain()
    assert "if its gradient is bfloat16" in text and "if its gradient is float32" in text
    p.grad, q.grad = torch.ones_like(p), torch.ones(8)
    assert "if its gradient" not in shardopt.AdamW([p, q]).explain()
    meta = nn.Parameter(torch.empty(64, 64, device="meta"))
    assert "(it is on meta)" in shardopt.AdamW([meta]).explain()
    assert "1 parameter of 64x64" in shardopt.Muon([meta]).explain()
    assert "reference (a parameter is not contiguous)" in shardopt.SGD([nn.Parameter(torch.ones(8, 4).t())]).explain()


def test_steps_that_were_refused_are_not_counted():
    """Kills: a count, or a group begun, before the step is known to go through."""
    p = nn.Parameter(torch.ones(8, 4).t())
    opt = shardopt.SGD([p], fused=True)
    p.grad = torch.ones(4, 8)
    with pytest.raises(ValueError, match="not contiguous"):
        opt.step()
    assert opt.calls == 0 and "so far: 0 steps" in opt.explain()
    opt.param_groups[0]["momentum"] = 0.9  # as a scheduler may, before the first step
    p.data = p.data.contiguous()
    opt.step()
    assert opt.calls == 1 and "momentum_buffer" in opt.state[p]
    p.grad = torch.ones(4, 8).to_sparse()
    with pytest.raises(ValueError, match="sparse"):
        opt.step()
    assert opt.calls == 1


def ones(*shapes):
    return [nn.Parameter(torch.ones(shape)) for shape in shapes]


def so_far(opt):
    """What is said of the steps."""
    return opt.explain().splitlines()[-1].removeprefix("so far: ").split("; ")[0]


def test_steps_are_those_of_the_training(tmp_path):
    """As the states count them, over a resume by either way. Kills: a count of this process, one of 1 for whatever was
    loaded, steps of before the load taken for steps since."""
    module, other = nn.Linear(8, 8), nn.Linear(8, 8)
    opt = shardopt.AdamW(module.parameters())
    train(opt, list(module.parameters()), 5)
    assert so_far(opt) == "5 steps"
    again = shardopt.AdamW(other.parameters())
    assert so_far(again) == "0 steps"
    again.load_state_dict(opt.state_dict())
    shardopt.save_checkpoint(tmp_path, module, opt, step=5)
    loaded = shardopt.AdamW(other.parameters())
    shardopt.load_checkpoint(tmp_path, other, loaded)
    for resumed in (again, loaded):
        assert so_far(resumed) == so_far(copy.deepcopy(resumed)) == "resumed at step 5, no step taken since"
        train(resumed, list(other.parameters()), 2)
        told = "7 steps, 2 calls of step() since the state was loaded"
        assert so_far(resumed) == so_far(copy.deepcopy(resumed)) == told


def test_steps_that_some_parameters_did_not_take():
    """And those that nobody took. Kills: the first parameter's count for all, skipped steps among those taken."""
    p, q = ones((3,), (4, 4))
    opt = shardopt.AdamW([p, q], nonfinite="skip")
    train(opt, [p], 3)
    p.grad = torch.full((3,), torch.inf)
    opt.step()
    assert so_far(opt) == "3 steps, some parameters fewer, from 0, 1 skipped" and opt.calls == 4


def rows_of(opt, group):
    """Title -> words of a group, as told."""
    lines = opt.explain().splitlines()
    first = lines.index(next(line for line in lines if line.startswith(f"group {group}: ")))
    here = takewhile(lambda line: line.startswith("  "), lines[first + 1 :])
    return {line[2:16].strip(): line[17:] for line in here}


def test_a_group_tells_its_numbers_and_formats():
    told = rows_of(shardopt.AdamW(ones((64, 96), (64, 96), (96,)), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1), 0)
    assert told["numbers"] == "lr 0.0003, weight_decay 0.1, betas (0.9, 0.95), eps 1e-08"
    assert told["parameters"] == "3 of 12,384 elements" and told["2 with"].startswith("exp_avg: sqrt8")
    assert not {"wire", "split", "orthogonalizer", "role", "mode"} & set(told)
    lr, meta = torch.tensor(0.5), nn.Parameter(torch.empty(4, device="meta"))
    assert "lr 0.5," in rows_of(shardopt.SGD([meta], lr=lr, maximize=True), 0)["numbers"]
    assert rows_of(shardopt.SGD([meta], maximize=True), 0)["numbers"].endswith("dampening 0, maximize")


def test_a_routed_model_tells_roles_and_the_wire_that_is_the_default():
    """Kills: a default that is not told, options of one group told of another."""
    model = nn.Sequential(nn.Embedding(50, 32), nn.Linear(32, 96), nn.Linear(96, 32))
    opt = shardopt.build_optimizer(model, lr=0.02, aux="lion", embedding_lr=0.06, aux_betas=(0, 0.5))
    told = [rows_of(opt, i) for i in range(3)]
    assert [each["role"] for each in told] == ["matrix", "embedding", "vector"]
    assert told[0]["orthogonalizer"] == "newton_schulz: 5 steps of quintic"
    assert told[0]["wire"] == "int8: int8(block=128) there and back"
    assert told[1]["numbers"] == "lr 0.06, weight_decay 0, betas (0, 0.5)"
    assert "wire" not in told[1]


def test_a_split_tells_how_it_cuts():
    """By shape. Kills: the option for what it does, shapes of another group."""
    qkv = {"params": ones((768, 512)), "split": (512, 128, 128), "ns_steps": 4, "ns_coefficients": "polar_express"}
    heads = {"params": ones((1536, 512), (64, 32), (64, 32)), "split": 64}
    opt = shardopt.Muon([qkv, heads], wire="int8+int4")
    told = rows_of(opt, 0)
    assert told["split"] == "768x512 into blocks of 512, 128, 128 rows"
    assert told["orthogonalizer"].endswith(": 4 steps of polar_express")
    assert told["wire"] == "int8+int4: int8(block=128) there, int4(block=64) back"
    assert rows_of(opt, 1)["split"] == "1536x512 into 24 blocks of 64 rows; 64x32 into 1 block of 64 rows"
    many = shardopt.Muon(ones(*((64 * i, 32) for i in range(1, 8))), split=64)
    assert rows_of(many, 0)["split"].count("into") == 4 and rows_of(many, 0)["split"].endswith("; 3 more shapes")
    assert "wire" not in rows_of(shardopt.Muon(ones((64, 32)), mode="local"), 0)
    assert rows_of(shardopt.Muon(ones((64, 32)), mode="periodic", period=3), 0)["mode"] == "periodic, period 3"


def test_many_parameters_are_told_on_one_screen():
    """291 tensors in 3 groups. Kills: a line a parameter."""
    blocks = [(512, 512)] * 128 + [(1376, 512)] * 64 + [(512, 1376)] * 32
    groups = [
        {"params": ones(*blocks), "recipe": Recipe(rules.Muon(), "int8", ("decay",)), "role": "matrix"},
        {"params": ones((1000, 512), (1000, 512)), "recipe": Recipe(rules.AdamW(), "int8")},
        {"params": ones(*[(512,)] * 65), "recipe": Recipe(rules.Lion(), "fp32")},
    ]
    lines = ShardedOptimizer(groups, lr=0.02).explain().splitlines()
    assert sum(len(group["params"]) for group in groups) == 291
    assert len(lines) <= 32 and max(len(line.partition("; runs on")[0]) for line in lines) <= 130


def test_bytes_of_torchs_optimizers_and_which_are_whose():
    """Kills: another optimizer's state that is refused or counted without scalars' owner, columns without a title."""
    for make in (torch.optim.AdamW, shardopt.AdamW):
        p = nn.Parameter(torch.ones(8, 5))
        opt = make([p], lr=1e-3)
        p.grad = torch.ones(8, 5)
        opt.step()
        found = shardopt.state_bytes(opt)
        assert (found.parameters, found.total, found.local, found.per_parameter) == (40, 320, 320, 8.0)
        assert str(found).splitlines()[0].split() == ["all", "ranks", "this", "rank"]


def test_groups_name_their_parameters():
    """Kills: a parameter in a group of another role that nothing shown reveals."""
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(5)))
    text = shardopt.AdamW(model.named_parameters()).explain()
    assert "5 of 80 elements: 0.weight, 1.weight, 2.weight and 2 more" in text
