"""schedule.py: the invariants its users rely on, for any lengths."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from core.schedule import assign, fullest, packs, passes, work_for_rank

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=20)


@given(st.integers(1, 4), st.integers(1, 5), st.data())
def test_every_rank_gets_equally_many_groups_and_nearly_equally_many_tokens(ranks, each, data):
    tokens = data.draw(st.lists(st.integers(1, 1000), min_size=ranks * each, max_size=ranks * each))
    assignments = assign(tokens, ranks)
    assert sorted(i for indices in assignments for i in indices) == list(range(len(tokens)))
    assert {len(indices) for indices in assignments} == {each}
    loads = [sum(tokens[i] for i in indices) for indices in assignments]
    assert max(loads) - min(loads) <= max(tokens)
    for indices in assignments:
        assert [tokens[i] for i in indices] == sorted((tokens[i] for i in indices), reverse=True)
    assert tokens[assignments[0][0]] == max(tokens)  # what is longest of all comes first of all


@given(st.integers(1, 4), st.integers(1, 8), st.integers(1, 120), st.data())
def test_packs_hold_every_document_once_within_the_budget(ranks, each, budget, data):
    lengths = data.draw(st.lists(st.integers(1, 60), min_size=ranks * each, max_size=ranks * each))
    parts, unforced = packs(lengths, budget, ranks), packs(lengths, budget, 1)
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    assert all(len(part) == 1 or sum(lengths[i] for i in part) <= budget for part in parts)
    assert len(parts) == -(-len(unforced) // ranks) * ranks
    assert (
        sum(sum(lengths[i] for i in part) <= budget / 2 for part in unforced) <= 1
    )  # two such would have shared one


@given(LENGTHS, st.integers(1, 120), st.integers(1, 25))
def test_passes_hold_every_completion_once_within_the_budget(lengths, budget, at_least):
    parts = passes(lengths, budget, at_least)
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    for part in parts:
        assert part and (len(part) == 1 or len(part) * max(lengths[i] for i in part) <= budget)
    assert len(parts) >= min(at_least, len(lengths))
    unforced = passes(lengths, budget)
    assert len(parts) == max(len(unforced), min(at_least, len(lengths)))
    tight = len(lengths) * max(lengths) <= budget
    assert (len(unforced) == 1) == (tight or len(lengths) == 1)


@given(LENGTHS, st.integers(1, 200))
def test_no_pass_is_fuller_than_the_one_that_is_rehearsed(lengths, budget):
    worst = fullest(max(lengths), len(lengths), budget)
    assert max(worst) <= max(lengths) and len(worst) <= len(lengths)
    fullest_of_these = max(sum(lengths[i] for i in part) for part in passes(lengths, budget))
    assert fullest_of_these <= sum(worst) + len(worst)  # equal lengths: rounded down


@dataclass
class Group:
    prompt: int
    lengths: list

    @property
    def tokens(self):
        return self.prompt + sum(self.lengths)


@given(st.integers(1, 4), st.integers(1, 9), st.integers(2, 6), st.integers(1, 100), st.data())
def test_ranks_call_the_model_equally_often(ranks, count, completions, budget, data):
    """Also where groups are fewer than ranks or no multiple of them; each counts once."""
    lengths = st.lists(st.integers(1, 50), min_size=completions, max_size=completions)
    groups = [Group(data.draw(st.integers(1, 99)), data.draw(lengths)) for _ in range(count)]
    plans = [work_for_rank(groups, rank, ranks, budget) for rank in range(ranks)]
    calls = [[len(parts) for _, parts, _ in plan] for plan in plans]
    assert all(call == calls[0] for call in calls) and len(calls[0]) == -(-count // ranks)
    trained = [group for plan in plans for group, _, counts in plan if counts]
    assert sorted(map(id, trained)) == sorted(map(id, groups))
    assert max(group.tokens for group in groups) == plans[0][0][0].tokens
