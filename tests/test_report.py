"""The page of a run: what it shows, how little a run needs to have for it, and that it works in a real browser."""

import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

import eval as evaluation
from grpo.pages import report
from grpo.pages.report import Span, choose
from grpo.run.cli import clean_errors, parse
from grpo.run.log import RunLog, write_json
from grpo.run.settings import Settings

BROWSER = next(filter(shutil.which, ("chromium", "chromium-browser", "google-chrome")), None)
HOSTILE = "</script><script>document.title = 'owned'</script><b>&amp;"


def make_metrics(step: int) -> dict:
    """What a step of GRPO logs, made up."""
    return {
        "reward": 0.5 + 0.01 * step,
        "rewards/answer/mean": 0.4,
        "rewards/format/mean": 0.9,
        "accuracy": 0.4,
        "entropy": 1 / step,
        "completions/mean_length": 20.0 + step,
        "completions/clipped_ratio": 0.25,
        "frac_reward_zero_std": 0.5,
        "grad_norm": None if step == 3 else 0.1,
        "learning_rate": 1e-5,
        "tokens_per_second": 1000.0,
        "time/rollout": 1.0,
        "step_time": 2.5,
    } | ({"eval/accuracy": 0.5, "eval/accuracy_low": 0.4, "eval/accuracy_high": 0.6} if step == 4 else {})


def make_completion(text: str, reward: float | None, tokens: list[str] | None = None) -> dict:
    completion = {
        "text": text,
        "reward": reward,
        "rewards": {"answer": reward, "format": 1.0},
        "correct": reward == 1,
        "advantage": None if reward is None else reward - 0.5,
        "finished": reward != 0,
    }
    if tokens:
        some = [(-0.01, 1.0, False), (-2.0, 1.3, True), (-9.0, 0.5, False)]
        logps, ratios, clipped = zip(*(some[i % 3] for i in range(len(tokens))), strict=True)
        completion |= {"tokens": tokens, "logps": logps, "ratios": ratios, "clipped": clipped}
    return completion


def make_group(step: int, rewards: tuple = (1.0, 0.0, None), tokens: bool = True) -> dict:
    texts = [f"first {step}", HOSTILE, "third"]
    completions = [
        make_completion(text, reward, [text[:4], text[4:]] if tokens else None)
        for text, reward in zip(texts, rewards, strict=True)
    ]
    prompt = f"<bos><start_of_turn>user\n<start_of_image>Be brief.\n\nQuestion {HOSTILE}?<end_of_turn>\n"
    group = {"id": f"row-{step}", "prompt": prompt, "answer": "7", "completions": completions}
    return group | ({"images": [f"images/{step}.png"]} if tokens else {})


def make_run(run: Path, *, steps: int = 5, settings: Settings | None = None, command: str = "python train.py") -> Path:
    """A run directory as training leaves it: per step a group with tokens and an image, and one without."""
    (run / "images").mkdir(parents=True)
    described = {"settings": asdict(settings or Settings(steps=steps)), "command": command, "git": "abc"}
    write_json(run / "config.json", described | {"packages": {"jax": "0.10"}, "devices": "1 cpu"})
    with RunLog(run, steps, resume_step=None) as log:
        for step in range(1, steps + 1):
            log.samples(step, [make_group(step, tokens=False) | {"id": "plain"}, make_group(step, tokens=False)])
            lines = json.dumps({"step": step} | make_group(step)) + "\n"
            with open(run / "samples.jsonl", "a", encoding="utf-8") as file:
                file.write(lines)
            Image.new("RGB", (13, 7), (step, 0, 0)).save(run / f"images/{step}.png")
            log.metrics(step, make_metrics(step))
    figure = {"accuracy": 0.5, "interval": [0.4038, 0.5962], "n": 100}
    write_json(run / "summary.json", {"before": figure, "after": figure | {"accuracy": 0.75, "interval": [0.66, 0.82]}})
    return run


class Reader(HTMLParser):
    """The tags of a page with their attributes, its headings, and the text outside scripts and styles."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.text, self.inside, self.source = [], "", "", path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        self.text += data if self.inside not in ("script", "style") else ""

    def of(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]

    def group_bytes(self) -> int:
        return sum(map(len, re.findall(r'<details class="group.*?</details>', self.source, re.DOTALL)))

    def of_class(self, name: str) -> list[dict]:
        return [attributes for _, attributes in self.tags if name in attributes.get("class", "").split()]


def plots(page: Reader) -> list[str]:
    return [attributes["aria-label"] for attributes in page.of("div") if attributes.get("role") == "img"]


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """A page to look at."""
    command = f"python train.py --data '{HOSTILE}'"
    return report.write(make_run(tmp_path_factory.mktemp("runs") / "run", command=command))


def test_the_page_is_one_file_that_loads_nothing(path):
    page = Reader(path)
    loaded = [a[name] for _, a in page.tags for name in ("src", "href", "xlink:href") if name in a]
    assert loaded
    assert all(address.startswith(("data:", "#")) for address in loaded)
    assert "@import" not in path.read_text(encoding="utf-8")


def test_what_was_logged_is_plotted_and_nothing_else(path):
    shown = plots(Reader(path))
    assert shown[:2] == ["Reward and its parts", "Accuracy, held out with 95% intervals"]
    assert "Tokens per second" in shown
    assert not {"KL to the base model, nats a token", "Memory at its peak, GiB", "Clipped tokens", "Loss"} & set(shown)


def test_every_metric_that_is_plotted_is_logged():
    root = Path(report.__file__).parents[2]
    sources = [path for path in (root / "grpo").rglob("*.py") if path.parent.name != "pages"]
    logged = "".join(path.read_text(encoding="utf-8") for path in [root / "train.py", *sources])
    for panel in report._CURVES:
        for name in set(panel.lines.values()) - {"finished"}:
            assert f'"{name}"' in logged


@pytest.mark.parametrize("lines", [[], [{"step": 1}], [{"step": 1, "reward": None, "grad_norm": None, "entropy": 2.0}]])
def test_a_run_that_has_logged_hardly_anything_has_a_page(tmp_path, lines):
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    for name in ("samples.jsonl", "summary.json"):
        (run / name).unlink()
    page = Reader(report.write(run))
    assert "Settings" in page.text
    assert not page.of("script")


def test_a_supervised_run_shows_its_loss_and_no_rewards(tmp_path):
    run = make_run(tmp_path / "run", settings=Settings(objective="sft", steps=2))
    lines = [{"step": step, "loss": 3.0 / step, "entropy": 1.0, "step_time": 1.0} for step in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (run / "samples.jsonl").unlink()
    page = Reader(report.write(run))
    assert "Loss" in plots(page)
    assert "Is anything wrong?" in page.text
    assert "Why is my reward flat?" not in page.text


def test_evaluations_come_with_their_intervals(tmp_path):
    run = report.read_run(make_run(tmp_path / "run"))
    steps, accuracies, intervals = zip(*report.evaluations(run), strict=True)
    assert steps == (0, 4, 5)
    assert accuracies == (0.5, 0.5, 0.75)
    assert intervals == ((0.4038, 0.5962), (0.4, 0.6), (0.66, 0.82))


def test_the_summary_of_a_run_that_goes_on_is_not_taken_for_its_end(tmp_path):
    run = make_run(tmp_path / "run", settings=Settings(steps=9))
    assert [step for step, *_ in report.evaluations(report.read_run(run))] == [0, 4]


def test_a_completion_is_shown_as_text_whatever_it_says(path):
    page = Reader(path)
    assert len(page.of("script")) == 1
    assert page.text.count(HOSTILE) > 5 * 3


def test_tokens_are_tinted_by_what_they_were(tmp_path):
    page = Reader(report.write(make_run(tmp_path / "run", steps=1)))
    tokens = [attributes for attributes in page.of("i") if "title" in attributes]
    assert {(token["class"], token["title"]) for token in tokens} == {
        ("", "99.0%, ratio 1.000"),
        ("p2 u2 clip", "13.5%, ratio 1.300"),
    }
    assert {"up1", "down1"} <= {name for a in page.of("article") for name in a["class"].split()}


def test_an_image_that_is_gone_is_said_to_be(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "images/2.png").unlink()
    page = Reader(report.write(run))
    assert len(page.of_class("image")) == 4
    assert "images/2.png is gone" in page.text


def spans(steps: int, a_step: int) -> list[Span]:
    """Groups; the last one of each step has tokens."""
    return [
        Span(s, plain=i < a_step - 1, start=s * a_step + i, size=1) for s in range(1, steps + 1) for i in range(a_step)
    ]


def test_groups_are_chosen_evenly_over_the_steps_newest_first():
    chosen = choose(spans(101, 3), 11)
    assert [span.step for span in chosen] == [101, 91, 81, 71, 61, 51, 41, 31, 21, 11, 1]
    assert not any(place.plain for place in chosen)
    assert [span.step for span in choose(spans(101, 3), 1)] == [101]


def test_of_few_steps_each_has_its_groups_with_tokens_before_any_other():
    chosen = choose(spans(7, 5), 17)
    assert len(chosen) == len(set(chosen)) == 17
    assert {place.step for place in chosen if not place.plain} == set(range(1, 8))
    assert choose(spans(7, 5), 1000) == sorted(spans(7, 5), key=lambda p: (-p.step, p.plain, p.start))
    assert choose([], 5) == []


def test_groups_are_found_in_the_file_without_parsing_it(tmp_path):
    path = make_run(tmp_path / "run") / "samples.jsonl"
    content = path.read_bytes()
    path.write_bytes(content + b'{"step": 6, "id": "row-6", "pro')  # being written
    index = report.find_spans(path)
    lines = [json.loads(content[place.start : place.start + place.size]) for place in index]
    assert [line["step"] for line in lines] == [span.step for span in index] == sorted([1, 2, 3, 4, 5] * 3)
    assert ["tokens" not in line["completions"][0] for line in lines] == [place.plain for place in index]


def test_long_completions_leave_room_for_fewer_groups(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", steps=20)
    page = Reader(report.write(run))
    assert len(page.of_class("group")) == 40
    size = len(page.source)
    for share in (2, 6):
        monkeypatch.setattr(report, "MOST_BYTES", page.group_bytes() // share)
        fewer = Reader(report.write(run))
        assert fewer.group_bytes() < 2 * report.MOST_BYTES
        assert len(fewer.source) < size
        assert fewer.of_class("group")[0]["data-step"] == "20"
        size = len(fewer.source)


def test_the_settings_that_were_chosen_come_first(tmp_path):
    settings = Settings(steps=5, beta=0.25, lora_targets=("q", "v"), learning_rate=2e-5, dtype="float32")
    run = make_run(tmp_path / "run", settings=settings, command="python train.py --learning-rate=2e-5")
    chosen = report.chosen_settings(json.loads((run / "config.json").read_text(encoding="utf-8")))
    assert chosen == {"steps": 5, "beta": 0.25, "lora_targets": ["q", "v"], "learning_rate": 2e-5}


def test_the_command_of_a_continued_run_starts_the_same_run_anew():
    settings = Settings(steps=5, beta=0.25, lora_targets=("q", "v"), use_bias_correction_kl=False, data="my data.jsonl")
    stored = json.loads(json.dumps(asdict(settings)))
    config = {"settings": stored, "command": "python train.py --resume runs/a"}
    words = subprocess.run(["sh", "-c", f"printf '%s\\n' {report.command(config)}"], capture_output=True, text=True)
    _, _, *flags = words.stdout.splitlines()
    assert parse(Settings, flags, prog="train.py", description="") == settings


def test_a_page_is_replaced_whole_or_not_at_all(tmp_path):
    run = make_run(tmp_path / "run")
    report.write(run)
    old = (run / "report.html").read_bytes()
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 6\n{"step": 7}\n')
    with pytest.raises(ValueError, match="line 6 is not JSON"):
        report.write(run)
    assert (run / "report.html").read_bytes() == old
    assert not list(run.glob(".report*"))


def test_a_page_of_a_hundred_steps_takes_less_than_three_seconds(tmp_path):
    run = make_run(tmp_path / "run", steps=100)
    report.write(run)
    started = time.process_time()
    report.write(run)
    assert time.process_time() - started < 3


def test_many_steps_are_averaged_into_few_points():
    lines = [{"step": step, "x": float(step)} for step in range(1, 4002)]
    steps, values = report._series(lines, "x")
    assert len(steps) <= 400
    assert steps == pytest.approx(values)
    assert values[0] == pytest.approx(6.0)  # the mean of 1 to 11


def test_runs_are_compared_by_what_differs(tmp_path):
    runs = [
        make_run(tmp_path / "a", settings=Settings(steps=5, beta=0.25, out=Path("runs/a"))),
        make_run(tmp_path / "b", settings=Settings(steps=5, beta=0.5, out=Path("runs/b"))),
    ]
    page = Reader(report.compare(runs, tmp_path / "both.html"))
    assert "75.0% (66.0 to 82.0)" in page.text
    assert re.findall(r"--[a-z_-]+", page.text) == ["--beta"]
    assert plots(page)[:2] == ["Reward and its parts", "Accuracy, held out with 95% intervals"]
    assert [key["style"] for key in page.of_class("key")] == ["--colour:#3d8fd9", "--colour:#e08a1e"]


def test_the_command_writes_a_runs_page_again_or_compares_several(tmp_path, monkeypatch, capsys):
    runs = [make_run(tmp_path / name) for name in "ab"]
    monkeypatch.chdir(tmp_path)
    for flags, written, title in (
        (["--report", "a"], "a/report.html", "a"),
        (["--report", "b", "--out", "other.html"], "other.html", "b"),
        (["--report", "a,b"], "compare.html", "2 runs compared"),
        (["--report", "a,b", "--out", "both.html"], "both.html", "2 runs compared"),
    ):
        evaluation.main(flags)
        assert capsys.readouterr().out == f"{written}\n"
        assert f"<h1>{title}</h1>" in Path(written).read_text(encoding="utf-8")
    assert not (runs[1] / "report.html").exists()


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    runs = [make_run(tmp_path / "first/run"), make_run(tmp_path / "second/run")]
    page = Reader(report.compare(runs, tmp_path / "both.html"))
    assert str(runs[0]) in page.text
    assert str(runs[1]) in page.text


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["{0}/none"], "is no run directory"),
        (["{0}/run,{0}/none"], "none is no run directory"),
        (["{0}/run", "--out", "{0}/none/x.html"], "there is no folder"),
        (["{0}/run,{0}/run", "--out", "{0}/none/x.html"], "there is no folder"),
    ],
)
def test_a_bad_path_is_one_sentence_and_exit_code_2(tmp_path, capsys, words, sentence):
    make_run(tmp_path / "run")
    with pytest.raises(SystemExit) as ended, clean_errors():
        evaluation.main(["--report", *(word.format(tmp_path) for word in words)])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert sentence in said
    assert said.count("\n") == 1


def test_as_a_program_it_names_its_page_and_plots_without_global_state(tmp_path):
    run = make_run(tmp_path / "run")
    code = (
        "import sys, eval\n"
        "assert 'matplotlib' not in sys.modules\n"  # it costs a second
        "eval.main(sys.argv[1:])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    root = Path(evaluation.__file__).parent
    ended = subprocess.run([sys.executable, "-c", code, "--report", run], capture_output=True, text=True, cwd=root)
    assert ended.stdout.splitlines() == [str(run / "report.html")], ended.stderr


PROBE = """
const failures = [];
addEventListener("error", event => failures.push(event.message));
addEventListener("load", () => {
  const form = document.getElementById("filter"), seen = {};
  const look = (name, values) => {
    form.reset();
    for (const key in values) form.elements[key].value = values[key];
    form.dispatchEvent(new Event("input"));
    const visible = [...document.querySelectorAll(".completion")].filter(x => x.checkVisibility());
    seen[name] = {
      count: document.getElementById("count").textContent,
      steps: [...document.querySelectorAll(".group")].filter(x => x.checkVisibility()).map(x => +x.dataset.step),
      rewards: [...new Set(visible.map(x => x.dataset.reward))].sort(),
      tint: getComputedStyle(document.querySelector(".p2.u2")).backgroundColor,
    };
  };
  form.elements.unfold.click();
  look("all", {});
  look("steps", {first: "2", last: "3"});
  look("reward", {least: "0.5"});
  look("low reward", {most: "0.5"});
  look("right", {verdict: "right"});
  look("wrong late", {verdict: "wrong", first: "5"});
  look("none", {least: "9", most: "10", verdict: "right"});
  look("ratio", {tint: "r"});
  look("nothing", {tint: ""});
  const result = document.createElement("pre");
  result.id = "probe";
  result.textContent = JSON.stringify({
    failures, seen, title: document.title,
    images: [...document.images].map(x => x.naturalWidth),
    plots: [...document.querySelectorAll("svg")].map(x => x.getBoundingClientRect().height > 50),
    wide: document.documentElement.scrollWidth > innerWidth,
  });
  document.body.append(result);
});
"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome is installed")
def test_in_a_real_browser_nothing_fails_images_show_and_the_filter_works(path, tmp_path):
    probed = tmp_path / "probed.html"
    document = path.read_text(encoding="utf-8").replace("<head>", f"<head><script>{PROBE}</script>", 1)
    probed.write_text(document, encoding="utf-8")
    arguments = ("--headless", "--no-sandbox", "--disable-gpu", "--window-size=500,900", "--dump-dom")
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    ended = subprocess.run(
        [BROWSER, *arguments, profile, probed.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    probe = re.search(r'<pre id="probe">(.*?)</pre>', ended.stdout, re.DOTALL)[1]
    found = json.loads(probe.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    seen = found["seen"]
    assert found["failures"] == []
    assert found["title"] == "run"
    assert found["images"] == [13] * 5
    assert len(found["plots"]) > 5
    assert all(found["plots"])
    assert not found["wide"]
    assert seen["all"]["count"] == "15 groups, 45 completions"
    assert seen["all"]["rewards"] == ["", "0.0", "1.0"]
    assert set(seen["steps"]["steps"]) == {2, 3}
    assert seen["reward"]["rewards"] == ["1.0"]
    assert seen["low reward"]["rewards"] == ["0.0"]
    assert seen["right"]["count"] == "15 groups, 15 completions"
    assert seen["right"]["rewards"] == ["1.0"]
    assert seen["wrong late"] == seen["all"] | {
        "count": "3 groups, 6 completions",
        "steps": [5, 5, 5],
        "rewards": ["", "0.0"],
    }
    assert seen["none"] == seen["all"] | {"count": "0 groups, 0 completions", "steps": [], "rewards": []}
    assert len({seen[name]["tint"] for name in ("all", "ratio", "nothing")}) == 3
