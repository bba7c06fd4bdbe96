"""Lines that an evaluation and the ablation leave, whole and right, for tests and for bench/hostile.py."""

RESULT = {
    "id": "line 1",
    "task": "gsm8k",
    "length": 0,
    "seed": 0,
    "expected": "3",
    "prediction": "#### 3",
    "score": 1.0,
    "prompt_tokens": 1,
    "completion_tokens": 1,
    "finished": True,
}
ARM = {
    "task": "recall",
    "algorithm": "dapo",
    "rule": "top",
    "fraction": 0.3,
    "more": "",
    "learning_rate": 1e-4,
    "seed": 1000,
    "rewards": [0.5],
    "held_out": {"a": {"prompt_tokens": 9, "accuracy": 0.5}},
    "moved_selected": 1.0,
    "moved_unselected": None,
    "seconds": 9.0,
}
