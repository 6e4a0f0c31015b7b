"""What the command line names as module:function is found, or one sentence says why not."""

import sys

import pytest
import torch
from torch import nn

from probes import RunError
from probes.target import load

MODULE = """
import torch
from torch import nn

def alone(): return nn.Linear(2, 3)
def pair(): return nn.Linear(2, 3), torch.ones(1, 2)
def several(): return nn.Linear(2, 3), (torch.ones(1, 2), torch.zeros(1))
def named(): return nn.Linear(2, 3), {"input": torch.ones(1, 2)}
def full():
    model = nn.Linear(2, 3)
    return {"model": model, "batch": [torch.ones(1, 2)], "loss": lambda out: out.sum(),
            "optimizer": torch.optim.SGD(model.parameters())}
def optional(width=2, *more, **others): return nn.Linear(width, 3)

def needs(config, *, depth): return nn.Linear(2, 3)
def number(): return 3
def triple(): return nn.Linear(2, 3), 1, 2
def odd(): return {"model": nn.Linear(2, 3), "bach": 1}
def no_model(): return torch.ones(1), torch.ones(1)
def bad_loss(): return {"model": nn.Linear(2, 3), "loss": 3.0}
def fails():
    raise ValueError("no checkpoint there.\\nLook elsewhere.")
def leaves(): raise SystemExit(2)
model = nn.Linear(2, 3)
width = 3
"""


@pytest.fixture
def name(tmp_path, monkeypatch):
    """A module of a name of its own in the current directory, which is not on the path yet."""
    name = f"target_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    (tmp_path / f"{name}_exits.py").write_text("import sys\nsys.exit('usage: train')\n")
    (tmp_path / f"{name}_lacks.py").write_text("import no_such_package\n")
    (tmp_path / f"{name}_broken.py").write_text("def build(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return name


def test_each_form_of_a_batch(name):
    assert isinstance(load(f"{name}:alone").model, nn.Linear) and load(f"{name}:alone").args is None
    assert load(f"{name}:optional").model.in_features == 2
    assert [len(load(f"{name}:{form}").args) for form in ("pair", "several", "named", "full")] == [1, 2, 0, 1]
    assert list(load(f"{name}:named").kwargs) == ["input"] and load(f"{name}:pair").kwargs == {}
    full = load(f"{name}:full")
    assert full.loss(torch.ones(2)) == 2 and isinstance(full.optimizer, torch.optim.SGD)
    assert full.model(*full.args, **full.kwargs).shape == (1, 3)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("NAME", "'NAME' names no function: give module:function, as in train:build"),
        ("NAME:", "'NAME:' names no function"),
        (":pair", "':pair' names no function"),
        ("", "'' names no function"),
        ("./NAME.py:pair", "./NAME.py:pair is a file: name its module instead, as in NAME:pair."),
        ("NAMEX:pair", "There is no module 'NAMEX' in this folder"),
        ("NAME.deeper:pair", "NAME cannot|There is no module 'NAME.deeper'"),
        ("NAME_exits:pair", "NAME_exits cannot be imported: SystemExit: usage: train .NAME_exits.py, line 2"),
        (
            "NAME_lacks:pair",
            "NAME_lacks cannot be imported: ModuleNotFoundError: No module named 'no_such_pack",
        ),
        ("NAME_broken:pair", "NAME_broken cannot be imported: SyntaxError"),
        ("NAME:piar", "NAME has no function 'piar': did you mean NAME:pair?"),
        ("NAME:model", "NAME:model is a model: name a function that returns it."),
        ("NAME:width", "NAME:width is no function but of type int"),
        (
            "NAME:needs",
            r"NAME:needs needs arguments .config, depth.: name a function that can be called with",
        ),
        ("NAME:number", "NAME:number returned something of type int: it must return a model"),
        ("NAME:triple", "NAME:triple returned something of type tuple"),
        ("NAME:odd", "NAME:odd returned a dict with 'bach'"),
        ("NAME:no_model", "NAME:no_model returned a model of type Tensor, not a torch.nn.Module"),
        ("NAME:bad_loss", "NAME:bad_loss returned a loss of type float: give a function of the output."),
        ("NAME:fails", r"NAME:fails failed: ValueError: no checkpoint there .NAME.py, line \d+..$"),
        ("NAME:leaves", "NAME:leaves failed: SystemExit: 2"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_sentence(name, given, said):
    with pytest.raises(RunError, match=said.replace("NAME", name)) as raised:
        load(given.replace("NAME", name))
    assert "\n" not in str(raised.value)
