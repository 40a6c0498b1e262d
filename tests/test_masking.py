"""Credentials: planted in texts, configs, logs, results and notebooks, and found masked."""

import json
import logging
import random
import string
import time

import execution
import nbformat
import pytest

from recsys_common import config, runs
from recsys_common.config import Config
from recsys_common.masking import masked


def made_up(length: int, seed: int = 0, letters: str = string.ascii_letters + string.digits) -> str:
    return "".join(random.Random(seed).choices(letters, k=length))


PEM = "-----BEGIN {0}PRIVATE KEY-----\n{1}\n{1}\n-----END {0}PRIVATE KEY-----".format
GOOGLE_KEY = "AIza" + made_up(35)
PLANTED = [  # (text with {} for the secret, secret, what the mark says)
    ("key {} in a text", GOOGLE_KEY, "Google API key"),
    ("Found {}, and", "ya29." + made_up(120), "Google OAuth token"),
    ("{}", "1//0" + made_up(60), "Google OAuth token"),
    ("{}", "GOCSPX-" + made_up(28), "Google OAuth secret"),
    ("before\n{}\nafter", PEM("", made_up(64)), "private key"),
    ("before\n{}\nafter", PEM("RSA ", made_up(64)), "private key"),
    ('{{"private_key": "{}\\n", "x": 1}}', PEM("", made_up(64)).replace("\n", "\\n"), "private key"),
    ('{{"private_key_id": "{}", "x": 1}}', made_up(40, letters="0123456789abcdef"), "private_key_id"),
    ("id {},", "AKIA" + made_up(16, letters=string.ascii_uppercase), "AWS key"),
    ("export AWS_SECRET_ACCESS_KEY={}", made_up(38) + "/+", "AWS_SECRET_ACCESS_KEY"),
    ("git clone https://me:{}@example.com/a.git", "correct-horse", "password"),
    ("postgresql://me:{}@db:5432/x", "p%40ss", "password"),
    ("{}", "ghp_" + made_up(36), "GitHub token"),
    ("{}", "github_pat_" + made_up(60), "GitHub token"),
    ("login('{}')", "hf_" + made_up(34), "Hugging Face token"),
    ("Authorization: Bearer {}", made_up(40), "authorization"),
    ("password={} rows=5", "hunter2hunter2", "password"),
    ("password = '{}'", "a b, c", "password"),
    ("db_password: {}", "hunter2hunter2", "db_password"),
    ("https://example.com/?access_token={}&page=2", made_up(20), "access_token"),
    ("train --api-key {} --rows 5", made_up(20), "api-key"),
    ('{{"token": "{}", "rows": 5}}', made_up(20), "token"),
    ('"source": "TOKEN = \\"{}\\"\\n"', made_up(20), "TOKEN"),
    ("api_key: str = '{}'", made_up(20), "api_key"),
]
LEFT = [
    "num_tokens: 51234567", "token: str", "token = tokens[0]", "password=None", "gs://bucket/user:x/y=z",
    'secret = os.environ["SECRET"]', "user@example.com: https://example.com/a@b", "a tokenizer: whitespace",
    '{"hash": "c0cefa665a17b16cf776daab1e4ba8b4f88ecec7717e349b7bdaf32d6a6b2d88"}', "token=$TOKEN", "",
]  # fmt: skip


@pytest.mark.parametrize(("text", "secret", "what"), PLANTED, ids=[what for *_, what in PLANTED])
def test_a_credential_becomes_a_mark_that_says_what_it_was(text, secret, what):
    found = masked(text.format(secret))
    assert found == text.format(f"[masked: {what}]")
    assert masked(found) == found


def test_what_is_no_credential_stays():
    assert [masked(text) for text in LEFT] == LEFT


def test_a_tree_of_json_keeps_all_but_its_secrets():
    tree = {
        "password": 'with "quotes" and \\', "rows": 5, "rate": 0.5, "none": None, "token": "", "ok": True,
        "deep": [{"note": f"used {GOOGLE_KEY}"}, ["x", 3]], "client_secret": "abcd", "page_token": None,
    }  # fmt: skip
    found = masked(tree)
    assert found == tree | {
        "password": "[masked: password]", "client_secret": "[masked: client_secret]",
        "deep": [{"note": "used [masked: Google API key]"}, ["x", 3]],
    }  # fmt: skip
    assert masked(found) == found and tree["client_secret"] == "abcd"


def test_a_config_with_a_credential_is_refused_with_the_path_of_the_field(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"data: {{folder: 'gs://bucket/{GOOGLE_KEY}'}}\n")
    with pytest.raises(
        ValueError, match=r"data\.folder: found gs://bucket/\[masked: Google API key\], expected no"
    ) as told:
        Config.load(path)
    assert GOOGLE_KEY[:12] not in str(told.value)
    with pytest.raises(ValueError, match=r"seed: found '\[masked: Google API key\]'") as told:
        Config(seed=GOOGLE_KEY)
    assert GOOGLE_KEY[:12] not in str(told.value)
    # and a config without one is what it was: masking changes no hash
    assert masked(Config().dump()) == Config().dump() and masked(Config().tree()) == Config().tree()
    assert all(masked(str(value)) == str(value) for value in config.leaves(Config.default("full").tree()).values())


def test_the_log_and_the_results_of_a_run_are_masked(tmp_path):
    with runs._log(tmp_path):
        runs.log.info("connecting with %s", GOOGLE_KEY)
        try:
            raise ValueError(f"refused: password={GOOGLE_KEY[4:20]}")
        except ValueError:
            runs.log.exception("ended by an error")
    text = (tmp_path / "log.txt").read_text()
    assert "INFO connecting with [masked: Google API key]" in text and "password=[masked: password]" in text
    assert "Traceback" in text and GOOGLE_KEY[4:20] not in text.replace("GOOGLE_KEY[4:20]", "")
    runs._written(tmp_path, {"state": "failed", "error": GOOGLE_KEY})
    assert json.loads((tmp_path / "run.json").read_text())["error"] == "[masked: Google API key]"
    assert logging.getLogger("recsys_common").handlers == []


def test_code_with_empty_quotes_stays_and_long_lines_take_no_time():
    for text in ('def f(password: str = "", project: str = "x"):', 'PASSWORD = ""  # see "doctor"', "{'token': ''}"):
        assert masked(text) == text
    assert masked("run --api-key abcdef123456") == "run --api-key [masked: api-key]"
    start = time.perf_counter()
    for text in ("-" * 20_000, "--a" * 7000, "password " * 3000, "token=" * 3000):
        masked(text)
    assert time.perf_counter() - start < 1  # one of them took half a minute


CHAPTER = """\
# %% [markdown]
# # A toy

# %% tags=["parameters"]
SCALE = "small"
KEY = ""

# %%
import os, pathlib, sys
folder = pathlib.Path("..") / "runs" / SCALE / "chapter-1"
during = folder.with_suffix(".ipynb").read_text()
print("hello", KEY)
print("to stderr", KEY, file=sys.stderr)
os.write(2, f"to the log {KEY}".encode())
KEY

# %%
_ = (folder / "metrics.json").write_text('{"rows": []}')
assert KEY not in during and "masked" in during, "written by papermill before this cell ran"
raise_it and 1 / 0
"""


@pytest.mark.parametrize("fails", [False, True])
def test_an_executed_notebook_its_log_and_its_record_are_masked(tmp_path, monkeypatch, fails):
    monkeypatch.setattr(execution, "ROOT", tmp_path)
    (tmp_path / "chapters").mkdir()
    path = tmp_path / "chapters" / "1_toy.py"
    path.write_text(CHAPTER.replace("raise_it and 1 / 0", "raise ValueError(KEY)" if fails else ""))
    job = execution.Job(path, "run", "small", {"KEY": GOOGLE_KEY})
    if fails:
        with pytest.raises(execution.Failed, match=r"ValueError: \[masked: Google API key\]"):
            execution.execute(job)
    else:
        assert execution.execute(job)["parameters"] == {"KEY": "[masked: Google API key]"}
        assert json.loads(job.record.read_text())["parameters"] == {"KEY": "[masked: Google API key]"}
    notebook = nbformat.read(job.executed, as_version=4)
    assert any('KEY = "[masked: Google API key]"' in cell.source for cell in notebook.cells)
    outputs = next(cell.outputs for cell in notebook.cells if "print(" in cell.source)
    shown = [output.get("text") or output.data["text/plain"] for output in outputs]
    assert "hello [masked: Google API key]\n" in shown and "'[masked: Google API key]'" in shown
    assert "to the log [masked: Google API key]" in job.log.read_text()
    files = [file for file in tmp_path.rglob("*") if file.is_file() and "ipython" not in file.parts]
    assert job.executed in files and len(files) >= 4
    assert [file for file in files if GOOGLE_KEY.encode() in file.read_bytes()] == []
