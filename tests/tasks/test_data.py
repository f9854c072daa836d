"""Data tasks: reading, holding out, refusing, and scoring through the task."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polopt.errors import CallError
from polopt.tasks.data import DataTask


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(json.dumps(r) for r in rows) + "\n")
    return f"data:{path}"


def sums(n: int = 40) -> list[dict[str, Any]]:
    return [{"prompt": f"{i}+1=", "answer": str(i + 1), "level": i % 3} for i in range(n)]


@pytest.fixture
def name(tmp_path: Path) -> str:
    return write(tmp_path / "sums.jsonl", sums())


def prompts(task: DataTask, split: Any) -> set[str]:
    return {str(i.prompt) for i in task.items(split)}


# ------------------------------------------------------------------ reading
def test_items_hold_prompt_and_columns(name: str) -> None:
    with_task = DataTask(name, {"reward": "exact"})
    item = next(i for i in with_task.items("train") if i.prompt == "3+1=") if "3+1=" in prompts(with_task, "train") else None
    item = item or next(i for i in with_task.items("eval") if i.prompt == "3+1=")
    assert dict(item.columns) == {"answer": "4", "level": 0}
    with_task.close()


def test_a_tenth_of_the_prompts_is_held_out_and_the_choice_is_fixed(name: str) -> None:
    first, again, other = (DataTask(name, {"reward": "exact", "seed": s}) for s in (0, 0, 1))
    assert len(first.items("eval")) == 4
    assert len(first.items("train")) == 36
    assert not prompts(first, "train") & prompts(first, "eval")
    assert prompts(first, "eval") == prompts(again, "eval") != prompts(other, "eval")


def test_repeated_prompts_stay_on_one_side(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i % 10}", "answer": str(i)} for i in range(60)]
    task = DataTask(write(tmp_path / "a.jsonl", rows), {"reward": "exact", "eval_fraction": 0.3})
    assert len(task.items("eval")) == 3
    assert len(task.items("train")) == 42
    assert not prompts(task, "train") & prompts(task, "eval")


def test_a_held_out_file_takes_its_prompts_out_of_training(name: str, tmp_path: Path) -> None:
    held_out = write(tmp_path / "held.jsonl", [*sums(5), *sums(2), {"prompt": "new", "answer": "x"}]).removeprefix("data:")
    task = DataTask(name, {"reward": "exact", "eval_split": held_out})
    assert len(task.items("eval")) == 6
    assert len(task.items("train")) == 35
    assert not prompts(task, "train") & prompts(task, "eval")


def test_parquet_json_and_saved_datasets_give_the_same_items(tmp_path: Path) -> None:
    import datasets

    rows = sums()
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(str(tmp_path / "a.parquet"))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    table.save_to_disk(str(tmp_path / "disk"))
    datasets.DatasetDict({"train": table, "test": table.select(range(3))}).save_to_disk(str(tmp_path / "splits"))
    expected = DataTask(write(tmp_path / "a.jsonl", rows), {"reward": "exact"}).items("train")
    for source in ("a.parquet", "a.json", "disk"):
        assert DataTask(f"data:{tmp_path / source}", {"reward": "exact"}).items("train") == expected
    split = DataTask(f"data:{tmp_path / 'splits'}", {"reward": "exact", "eval_split": "test"})
    assert prompts(split, "eval") == {"0+1=", "1+1=", "2+1="}
    assert len(split.items("train")) == 37
    with pytest.raises(CallError, match="did you mean 'test'"):
        DataTask(f"data:{tmp_path / 'splits'}", {"reward": "exact", "eval_split": "tst"}).items("eval")


def test_a_folder_of_data_files_is_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "train.jsonl", sums())
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert len(DataTask(f"data:{folder}", {"reward": "exact"}).items("train")) == 36


def test_chat_prompts_and_system_messages(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}, {"role": "user", "content": "bye"}]
    rows = [{"prompt": chat, "answer": "a"}, {"prompt": "plain", "answer": "b"}]
    task = DataTask(write(tmp_path / "a.jsonl", rows), {"reward": "exact", "system": "be brief", "eval_fraction": 0.5})
    found = [*task.items("train"), *task.items("eval")]
    system = {"role": "system", "content": "be brief"}
    assert [system, *chat] in [i.prompt for i in found]
    assert [system, {"role": "user", "content": "plain"}] in [i.prompt for i in found]


def test_rows_with_different_keys_get_all_columns(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2", "hint": "h"}]
    task = DataTask(write(tmp_path / "a.jsonl", rows), {"reward": "exact", "eval_fraction": 0.5})
    columns = {i.prompt: i.columns for i in (*task.items("train"), *task.items("eval"))}
    assert columns == {"a": {"answer": "1", "hint": None}, "b": {"answer": "2", "hint": "h"}}


# ------------------------------------------------------------------ refusing
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": "b"\n', r"a.jsonl:2: broken JSON"),
        ('{"prompt": "a"}\n[1]\n', r"a.jsonl:2: expected a JSON object.*list"),
        ('{"prompt": "a"}\n\n{"prmpt": "b"}\n', r"a.jsonl:3: there is no column 'prompt', did you mean 'prmpt'"),
        ('{"prompt": 3}\n', r"a.jsonl:1: column 'prompt' holds int '3'"),
        ('{"prompt": null}\n', r"a.jsonl:1: column 'prompt' holds nothing"),
        ('{"prompt": "  "}\n', r"a.jsonl:1: the prompt in column 'prompt' is empty"),
        ('{"prompt": [{"role": "user"}]}\n', r"a.jsonl:1: message 0"),
        ('{"prompt": [{"role": "assistant", "content": "x"}]}\n', r"a.jsonl:1: the last message .* assistant"),
        ("", r"has no rows"),
        ('{"prompt": "a"}\n{"prompt": "a"}\n', r"has 1 distinct prompt, none can be held out"),
    ],
)
def test_bad_files_are_refused_with_file_and_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(CallError, match=message):
        DataTask(f"data:{path}", {"reward": "length:5"}).items("train")


def test_files_that_are_not_what_they_seem(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("no parquet")
    with pytest.raises(CallError, match=r"a.parquet cannot be read as Parquet"):
        DataTask(f"data:{tmp_path / 'a.parquet'}", {"reward": "length:5"}).items("train")
    (tmp_path / "b.jsonl").write_bytes(b'{"prompt": "\xff\xfe"}\n')
    with pytest.raises(CallError, match="not UTF-8"):
        DataTask(f"data:{tmp_path / 'b.jsonl'}", {"reward": "length:5"}).items("train")


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("{folder}/sumz.jsonl", {"reward": "exact"}, "there is no file .*did you mean 'sums.jsonl'"),
        ("{folder}/a.csv", {"reward": "exact"}, "there is no file"),
        ("", {"reward": "exact"}, "needs a path or a dataset id"),
        ("{folder}/sums.jsonl", {}, "needs a reward"),
        ("{folder}/sums.jsonl", {"reward": "exakt"}, "did you mean 'exact'"),
        ("{folder}/sums.jsonl", {"reward": "exact", "weight": [1]}, "did you mean 'weights'"),
        ("{folder}/sums.jsonl", {"reward": "exact", "weights": [1, 2]}, "2 numbers for 1 rewards"),
        ("{folder}/sums.jsonl", {"reward": "exact", "eval_fraction": 1.0}, "eval_fraction = 1.0 must be"),
        ("{folder}/sums.jsonl", {"reward": "exact", "eval_items": 0}, "eval_items = 0 must be"),
        ("{folder}/sums.jsonl", {"reward": "exact", "prompt_column": 3}, "prompt_column = 3 must be str"),
        ("{folder}/sums.jsonl", {"reward": "exact", "on_error": "ignore"}, "on_error 'ignore'"),
        ("{folder}/sums.jsonl", {"reward": "exact", "eval_split": "none.jsonl"}, "there is no file"),
    ],
)
def test_wrong_calls_are_refused_before_anything_is_read(
    name: str, tmp_path: Path, source: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(CallError, match=message):
        DataTask("data:" + source.format(folder=tmp_path), options)


def test_answer_columns_are_found_or_asked_for(tmp_path: Path) -> None:
    rows = [{"prompt": str(i), "target": "x"} for i in range(4)]
    name = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(CallError, match="'exact' needs a column with the right answers: set answer_column; columns: target"):
        DataTask(name, {"reward": "exact"}).items("train")
    with pytest.raises(CallError, match="no column 'targt', did you mean 'target'"):
        DataTask(name, {"reward": "exact", "answer_column": "targt"}).items("train")
    task = DataTask(name, {"reward": "exact", "answer_column": "target"})
    assert task.score([task.items("train")[0]], ["x"], [[1]]) == 1


def test_an_unknown_dataset_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def absent(*args: Any, **kwargs: Any) -> None:
        raise FileNotFoundError("no such dataset on the hub")

    monkeypatch.setattr(datasets, "load_dataset", absent)
    with pytest.raises(CallError, match="dataset 'nobody/nothing' cannot be loaded: FileNotFoundError"):
        DataTask("data:nobody/nothing", {"reward": "exact"}).items("train")


def test_construction_imports_nothing_heavy(name: str) -> None:
    program = f"""
import sys
from polopt.tasks.data import DataTask
DataTask({name!r}, {{"reward": ["math", "regex:x"]}})
print([m for m in ("datasets", "pyarrow", "transformers", "math_verify", "sympy.core") if m in sys.modules and m != "sympy.core"])
"""
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert out.stdout.strip() == "[]"


# ------------------------------------------------------------------ scoring
def test_scores_are_weighted_and_correctness_is_not(name: str, tmp_path: Path) -> None:
    (tmp_path / "my.py").write_text("def level(level, completions): return [float(x) for x in level]\n")
    task = DataTask(name, {"reward": ["math", f"{tmp_path}/my.py:level"], "weights": [0.5, 0.1]})
    items = [i for i in task.items("train") if i.columns["level"] == 2][:1] * 2
    right = str(items[0].columns["answer"])
    scores = task.score(items, [f"it is {right}", "nothing"], [[1], [2]])
    np.testing.assert_allclose(scores, [[0.5, 0.2], [0.0, 0.2]])
    assert task.channels == ("math", "level")
    assert task.correct(scores).tolist() == [True, False]
    assert task.score([], [], []).shape == (0, 2)
    task.close()


def test_chat_completions_are_messages(tmp_path: Path) -> None:
    seen: list[Any] = []

    def look(prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float]:
        seen.append((prompts, completions, kwargs))
        return [0.0] * len(prompts)

    chat = [{"role": "user", "content": "hi"}]
    rows = [{"prompt": chat, "completion": "leaked"}, {"prompt": "plain", "completion": "leaked"}]
    task = DataTask(write(tmp_path / "a.jsonl", rows), {"reward": look, "eval_fraction": 0.5})
    items = sorted((*task.items("train"), *task.items("eval")), key=lambda i: isinstance(i.prompt, str))
    task.score(items, ["one", "two"], [[1], [2]])
    assert seen == [([chat, "plain"], [[{"role": "assistant", "content": "one"}], "two"], {"completion_ids": [[1], [2]]})]
