"""run/config.py: settings that contradict each other."""

import pytest

from base.cli import BadInput, parse
from run.config import Config, check


@pytest.mark.parametrize("settings, message", [
    (
        {"algorithm": "dapo", "aggregation": "constant"},
        "--aggregation needs --algorithm grpo: dapo has a mean"
    ),
    ({"algorithm": "gspo", "updates": 2, "dual_clip": 3.0}, "--dual-clip is not for --algorithm gspo"),
    ({"algorithm": "clip-cov", "dual_clip": 3.0}, "--dual-clip is not for --algorithm clip-cov"),
])  # fmt: skip
def test_flags_of_another_algorithm_are_refused(settings, message):
    with pytest.raises(BadInput, match=message):
        check(Config(**settings), world=1, cuda=False)


def test_a_dual_clip_that_would_clip_every_loss_is_refused():
    with pytest.raises(BadInput, match="--dual-clip must be more than 1, not 0.5"):
        parse(Config, "", ["--dual-clip", "0.5"])
