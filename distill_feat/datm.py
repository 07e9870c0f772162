"""Learn a few images per class with soft labels by matching trajectories at growing difficulty (DATM), and judge them.

    python distill_feat/buffer.py --config_path config/distill_feat/buffer/digits.yaml
    python distill_feat/datm.py --config_path config/distill_feat/datm/digits_ipc1.yaml

As mtt.py, with feature labels if wanted, and besides: students start at epochs of a window that grows; label logits
are learned, and start as those of experts that are right; a start whose loss is over `condense.threshold` moves
nothing. To resume, run the same command again.
"""

if __name__ == "__main__":  # thread settings count only before torch is imported
    from utils.launch import prepare

    prepare()

from pathlib import Path

from config import Option
from distill_feat.trajectory_job import TRAJECTORY_OPTIONS, TrajectoryRunConfig, method
from utils.program import leave, run_program

HERE = Path(__file__).resolve().parent
DEFAULT = HERE.parent / "config" / "distill_feat" / "datm" / "base.yaml"
OPTIONS = (
    *TRAJECTORY_OPTIONS,
    Option("current_max_start_epoch", "condense.current_max_start_epoch", "value", "end of the window at first"),
    Option("expansion_end_epoch", "condense.expansion_end_epoch", "value", "iteration by which it has grown"),
    Option("threshold", "condense.threshold", "value", "largest loss that moves the set"),
)
TAKES = (TrajectoryRunConfig, OPTIONS)


def main() -> int:
    """Exit status."""
    return run_program(__doc__ or "", HERE, *TAKES, method("datm").run, DEFAULT)


if __name__ == "__main__":
    leave(main())
