"""Numbers as the tables of the command line show them."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pessa_cli.evaluation.figures import Figure
    from pessa_cli.tuning.train import TrainingStep

PERCENT = ("accuracy", "word error rate")  # metrics that are shown in percent


def step_row(step: TrainingStep) -> dict[str, str]:
    """Format a step of training, by column."""
    left = step.seconds / max(1, step.step - step.first) * (step.steps - step.step)
    return {
        "step": f"{step.step}/{step.steps}",
        "epoch": f"{step.epoch:.2f}",
        "loss": "" if step.loss is None else f"{step.loss:.4f}",
        "eval loss": "" if step.eval_loss is None else f"{step.eval_loss:.4f}",
        "learning rate": "" if step.learning_rate is None else f"{step.learning_rate:.2e}",
        "tokens/s": f"{step.tokens_per_second:,.0f}" if step.tokens_per_second else "",
        "time": f"{timedelta(seconds=round(step.seconds))}",
        "left": f"{timedelta(seconds=round(left))}",
    }


def measured(metric: str, value: float, sign: str = "", digits: int = 4) -> str:
    """Format a metric, in percent if it is shown so. sign: "+" shows the sign of every value."""
    return f"{100 * value:{sign}.1f}" if metric in PERCENT else f"{value:{sign}.{digits}g}"


def within(metric: str, figure: Figure, change: bool = False) -> str:
    """Format a figure, or a change of one, with its interval in brackets, if it has one."""
    sign, ends = "+" if change else "", figure.interval
    shown = (measured(metric, end, sign, 4 if abs(end) >= 1000 else 3) for end in ends or ())
    return measured(metric, figure.value, sign) + (f" [{', '.join(shown)}]" if ends else "")


def quantity(value: float, unit: str) -> str:
    """Format bytes, seconds, or a number a second."""
    if unit == "bytes":
        return size(value)
    if unit == "seconds":
        return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"
    return f"{value:,.0f}"


def size(count: float) -> str:
    """Format bytes in decimal units, as file managers and hubs do."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
