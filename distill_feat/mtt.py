"""Learn a few images per class, each with a feature label (x, y, F), by matching trajectories (MTT), and judge them.

    python distill_feat/buffer.py --config_path config/distill_feat/buffer/digits.yaml
    python distill_feat/mtt.py --config_path config/distill_feat/mtt/digits_ipc1.yaml
    torchrun --nproc_per_node=4 distill_feat/mtt.py --dataset=CIFAR100 --ipc=48 --lbd 0.0005 --zca --data_path DIR

The trajectories are of buffer.py's experts. The gradient is that of the whole student (condense.mode: exact) at the
memory of one of its steps. Without --lbd or another key of `feature` there is no F: plain MTT. --init takes real,
noise, or the file of a set, as of a run before. To resume, run the same command again. The table has {no F, F} x
{no views, views}, and what else the bytes could hold.
"""

if __name__ == "__main__":  # thread settings count only before torch is imported
    from utils.launch import prepare

    prepare()

from pathlib import Path

from distill_feat.trajectory_job import TRAJECTORY_OPTIONS, TrajectoryRunConfig, method
from utils.program import leave, run_program

HERE = Path(__file__).resolve().parent
DEFAULT = HERE.parent / "config" / "distill_feat" / "mtt" / "base.yaml"
TAKES = (TrajectoryRunConfig, TRAJECTORY_OPTIONS)


def main() -> int:
    """Exit status."""
    return run_program(__doc__ or "", HERE, *TAKES, method("mtt").run, DEFAULT)


if __name__ == "__main__":
    leave(main())
