"""
Validation curves of runs as a PNG, with Pillow alone:

    python docs/curves.py docs/ablation.png runs/gelu runs/relu2
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.plot import plot


def curve(run):
    """[(step, validation loss)] of a run folder"""
    entries = [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]
    return [(e["step"], e["val_loss"]) for e in entries if "val_loss" in e]


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    plot(sys.argv[1], {run: curve(run) for run in sys.argv[2:]}, "step", "validation loss", log=True)
