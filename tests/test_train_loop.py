"""The one training loop, on a network of a few weights."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from edgediff.errors import TargetError, TrainingError
from edgediff.train.loop import LOSS, Loop, Task, recent


class Line(Task):
    """Learns y = 2 x from one batch an update."""

    def __init__(
        self, spoil: Callable[[torch.Tensor], torch.Tensor] | None = None, free: tuple[str, ...] = (), **settings: Any
    ) -> None:
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Dropout(0.5))
        given = SimpleNamespace(seed=0, learning_rate=0.1, ema=0.5, checkpoint_minutes=0, free=free, **settings)
        super().__init__(Accelerator(), given, module, torch.optim.SGD(module.parameters()), module, 4)
        self.spoil = spoil
        self.rates: list[float] = []

    def terms(self, model: Callable[..., Any], batch: Any) -> dict[str, torch.Tensor]:
        """The squared error; spoilt at update 2 by `spoil`."""
        self.rates.append(self.optimizer.param_groups[0]["lr"] / 0.1)
        x = torch.ones(2, 1)
        loss = (model(x) - 2 * x).square().mean()
        return {LOSS: self.spoil(loss) if self.spoil is not None and batch == 2 else loss}


def nan_backwards(loss: torch.Tensor) -> torch.Tensor:
    """The same loss, with a gradient of NaN."""
    same = loss.clone()
    same.register_hook(lambda gradient: gradient * torch.nan)
    return same


def resumes(path: Path) -> None:
    """Checks that an interrupted training of `Line` resumes, and ends as one that was not interrupted."""
    again, whole = Line(), Line()
    Loop(again, path).run()
    Loop(whole).run()  # without a folder there are no checkpoints
    assert again.state.losses == whole.state.losses
    assert all(map(torch.equal, again.module.parameters(), whole.module.parameters()))


@pytest.mark.parametrize(
    ("spoil", "what"), [(lambda loss: loss * torch.inf, "loss"), (nan_backwards, "gradient")], ids=["loss", "gradient"]
)
def test_what_is_not_finite_never_reaches_the_weights(
    tmp_path: Path, spoil: Callable[[torch.Tensor], torch.Tensor], what: str
) -> None:
    task = Line(spoil)
    words = rf"the {what} is not finite at update 2; the last good checkpoint is .*visit-0+2; .* learning_rate than 0.1"
    with pytest.raises(TrainingError, match=words):
        Loop(task, tmp_path).run()
    assert all(bool(parameter.isfinite().all()) for parameter in task.module.parameters())
    resumes(tmp_path)


def test_what_to_do_after_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    """A checkpoint is resumed from with a lower learning rate only where that may change."""
    for path, free, words in (
        (tmp_path / "a", ("learning_rate",), "visit-00000002; resume from it with a lower learning_rate"),
        (tmp_path / "b", (), "visit-00000002; start again with a lower learning_rate"),
        (None, ("learning_rate",), "there is no checkpoint before it; start again with a lower learning_rate"),
    ):
        with pytest.raises(TrainingError, match=words):
            Loop(Line(nan_backwards, free), path).run()


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left"), RuntimeError("[enforce fail at inline_container.cc:664]"), SafetensorError("full")],
    ids=["python", "torch", "safetensors"],
)
@pytest.mark.parametrize("calls", [1, 3])
def test_a_full_disk_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, calls: int
) -> None:
    save, left = Accelerator.save_state, [None] * calls

    def full(self: Accelerator, output_dir: str) -> Any:
        left.pop()
        if left:
            return save(self, output_dir)
        Path(output_dir).mkdir(parents=True)
        raise error

    words = "the last good checkpoint is .*visit-00000002" if calls > 1 else "there is no checkpoint before it"
    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "save_state", full)
        with pytest.raises(TargetError, match=rf"visit-0000000{calls}\.partial cannot be written: .*; {words}"):
            Loop(Line(), tmp_path).run()
    resumes(tmp_path)


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1]),
        ("cosine", 0, [0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(4)]),
        ("cosine", 2, [0.5, 1, 1, 0.5]),
        ("constant", 9, [0.25, 0.5, 0.75, 1]),
    ],
)
def test_learning_rates(schedule: str, warmup: int, expected: list[float]) -> None:
    task = Line(schedule=schedule, warmup=warmup)
    Loop(task).run()
    assert task.rates == pytest.approx(expected)


def test_the_module_ends_with_the_averaged_weights_and_torchs_seed_is_left_alone() -> None:
    task = Line()
    loop = Loop(task)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    said: list[tuple[str, float]] = []
    loop.run(lambda *args: said.append(args))
    assert torch.equal(torch.get_rng_state(), state)
    assert loop.ema is not None
    assert all(map(torch.equal, task.module.parameters(), loop.ema.shadow_params))
    assert not task.module.training
    assert [share for _, share in said] == [0.25, 0.5, 0.75, 1]
    assert said[-1][0] == f"update 4 of 4: loss {recent(task.state.losses):.4f}"
