"The plan for several GPUs: what sharing may bring and what it may not, whatever the settings; measured times in proportion."
import dataclasses
import heapq
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stasc.core import Config, ConfigError, Question
from stasc.data import Data
from stasc.plan import _drawn_share, plan, scaling, texts_of

BY = ("ray", "accelerate", "both")
MANY = 2**30
ALL = tuple(range(1, 40)) + (64, 1000, MANY)


@st.composite
def configs(draw):
    whole = lambda a, b: draw(st.integers(a, b))
    return Config(model="Qwen/Qwen2.5-1.5B-Instruct", variant=draw(st.sampled_from(["EIE", "FIE", "FNF", "ENF"])), finetune=draw(st.sampled_from(["lora", "qlora", "full"])),
                  iterations=whole(1, 12), n_train=whole(1, 3000), n_test=whole(1, 1000), n_init=whole(1, 5), n_corr=whole(1, 5), part_size=whole(1, 300),
                  train_batch=whole(1, 33), grad_accumulation=whole(1, 3), epochs=whole(1, 3), pairing=draw(st.sampled_from(["sampled", "crossed"])),
                  gradient_checkpointing=draw(st.sampled_from(["auto", "on", "off"])))


def hours(s): return {r["gpus"]: r["hours"] for r in s.rows if r["fits"]}


@settings(max_examples=60, deadline=None)
@given(configs(), st.sampled_from(BY), st.sampled_from(["T4", "L4", "A100 40GB", "A100 80GB"]))
def test_more_gpus_never_take_longer_nor_do_better_than_linear_and_reach_the_limit(cfg, by, gpu):
    try: s = scaling(cfg, gpu, ALL, by)
    except ConfigError as e:
        assert "does not fit" in str(e) and not any(r["fits"] for r in plan(cfg, gpu).rows if r["finetune"] == cfg.finetune)
        return
    h, near = hours(s), 1 + 1e-9
    fit = [r["fits"] for r in s.rows]
    assert fit == sorted(fit)                                           # what fits on few GPUs fits on more
    if by == "both":                                                    # several load the model again and again
        again = {r["gpus"]: r["rest"] - s.rows[0]["rest"] for r in s.rows if r["fits"] and fit[0]}
        assert all(v == pytest.approx(2 * cfg.iterations * s.single["load"] / 3600 if n > 1 else 0) for n, v in again.items())
        h.pop(1, None)
    assert all(a * near >= b for a, b in zip(list(h.values()), list(h.values())[1:]))
    if cfg.finetune != "full" and by != "both":                         # with more memory a full fine-tuning may do without checkpointing
        assert all(h[1] <= n * h[n] * near for n in h)
        assert all(0 < r["efficiency"] <= near for r in s.rows)
    assert h[MANY] == pytest.approx(s.limit) and all(s.limit <= v * near for v in h.values())
    for r in s.rows:
        if r["fits"]:
            assert r["hours"] == pytest.approx(r["drawing"] + r["training"] + r["rest"])
            assert r["gpu_hours"] == pytest.approx(r["gpus"] * r["hours"])
    rest = {r["rest"] for r in s.rows if r["gpus"] in h}
    assert len(rest) == 1 and s.limit >= rest.pop()                      # nobody shares it


@settings(max_examples=60, deadline=None)
@given(configs(), st.sampled_from(BY))
def test_one_gpu_takes_what_the_plan_says(cfg, by):
    planned = next(r for r in plan(cfg, "A100 40GB").rows if r["finetune"] == cfg.finetune)
    if not planned["fits"]: return
    one = scaling(cfg, "A100 40GB", [1], by).rows[0]
    assert one["drawing"] + one["training"] == pytest.approx(planned["hours"])
    assert one["peak"] == pytest.approx(planned["peak"])
    assert one["speedup"] == pytest.approx(1) and one["efficiency"] == pytest.approx(1)


@settings(max_examples=60, deadline=None)
@given(configs(), st.sampled_from(BY))
def test_doubling_saves_a_fifth_up_to_what_is_worth_it_and_not_beyond(cfg, by):
    s = scaling(cfg.replace(finetune="lora"), "A100 40GB", [2**i for i in range(25)], by)
    h = hours(s)
    assert h[2 * s.worth] > .8 * h[s.worth]
    assert all(h[2 * g] <= .8 * h[g] for g in h if g < s.worth)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 600), st.integers(1, 200), st.integers(1, 50))
def test_engines_that_take_part_after_part_are_done_when_said(questions, size, engines):
    "Against a simulation of the pool: whoever is free takes the next part."
    free = [0] * engines
    for a in range(0, questions, size): heapq.heapreplace(free, free[0] + min(size, questions - a))
    assert _drawn_share(questions, size, engines) == pytest.approx(max(free) / questions)


def test_a_phase_has_no_more_engines_at_work_than_parts():
    cfg = Config.paper(finetune="lora")                                 # 500 questions, parts of 128
    h = hours(cfg.scaling(gpus=(2, 3, 4, 5, 400)))
    assert h[2] > h[3] > h[4] == h[5] == h[400]
    finer = hours(cfg.replace(part_size=16).scaling(gpus=(4, 5, 32, 400)))
    assert finer[4] > finer[5] > finer[32] == finer[400]
    assert finer[400] < h[400]


def test_a_step_has_no_more_processes_at_work_than_rows():
    s = Config.paper(finetune="lora", train_batch=4, grad_accumulation=2).scaling(gpus=(1, 2, 3, 4, 5, 8, 9), by="accelerate")
    first = s.rows[0]["training"]
    assert [r["training"] / first for r in s.rows] == pytest.approx([1, .5, 3 / 8, .25, .25, 1 / 8, 1 / 8])
    assert len({r["drawing"] for r in s.rows}) == 1


def test_with_ray_only_drawing_is_shared():
    s = Config.paper(finetune="lora").scaling(by="ray")
    assert len({r["training"] for r in s.rows}) == len({r["peak"] for r in s.rows}) == 1


def test_fsdp_makes_room_and_lora_does_not():
    cfg = Config.paper("microsoft/Phi-3-mini-4k-instruct")
    s = cfg.scaling("A100 40GB", by="accelerate", gpus=(1, 2, 4))
    assert [r["fits"] for r in s.rows] == [False, True, True] and s.rows[0]["hours"] is None
    assert "does not fit" in repr(s) and s.rows[1]["speedup"] == pytest.approx(2)
    with pytest.raises(ConfigError, match="however many there are"): cfg.scaling("A100 40GB", by="ray")
    lora = cfg.replace(finetune="lora").scaling("A100 40GB", by="accelerate", gpus=(1, 8))
    assert lora.rows[0]["peak"] == lora.rows[1]["peak"]


def test_money_is_gpu_hours_at_the_price_given_and_otherwise_not_spoken_of():
    cfg = Config.paper(finetune="lora")
    assert "cost" not in repr(cfg.scaling()) and not any("cost" in r for r in cfg.scaling().rows)
    assert all(r["cost"] == pytest.approx(2.5 * r["gpu_hours"]) for r in cfg.scaling(price=2.5).rows)
    assert all(r["cost"] == 0 for r in cfg.scaling(price=0).rows)


@pytest.mark.parametrize("wrong", [dict(gpu="H9000"), dict(by="dask"), dict(gpus=()), dict(gpus=(0,)), dict(gpus=(1.5,)), dict(gpus=(-2, 4)), dict(gpus=(True, "2"))])
def test_what_cannot_be_asked_is_refused_in_one_sentence(wrong):
    with pytest.raises(ConfigError) as e: Config.demo().scaling(**wrong)
    assert "\n" not in str(e.value)


# --- from a run

def guess(prompt, rng, skill): return f"Final Answer: {7 if rng.random() < .5 else rng.randrange(7)}"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from stasc.loop import STaSC
    from stasc.train import ScriptedEngine
    ask = lambda n, s: tuple(Question(f"{s}{i}", f"{s} number {i}?", ("7",)) for i in range(n))
    cfg = Config(data="own", iterations=2, n_train=20, n_test=8, n_init=2, n_corr=2, part_size=8)
    made = STaSC(cfg, tmp_path_factory.mktemp("measured") / "run", data=Data(ask(20, "a"), ask(8, "b")), engine=ScriptedEngine(guess), callbacks=[]).run()
    return made


def write_log(run, change=lambda e: e):
    "Times that are easy to reckon with: a second for each text drawn, two for each training, of which half is the model's."
    lines = []
    for n in range(run.n_done):
        for phase, (_, drawn, _) in texts_of(run.cfg).items(): lines.append(dict(iteration=n, phase=phase, seconds=float(drawn), model_seconds=drawn / 2))
        lines.append(dict(iteration=n, phase="metrics", seconds=3., model_seconds=0.))
        if n: lines.append(dict(iteration=n, phase="train", seconds=2., model_seconds=1.))
    lines.append(dict(iteration=0, phase="load", seconds=5., model_seconds=5., engines=1))
    (run.dir / "log.jsonl").write_text("".join(json.dumps(change(e)) + "\n" for e in lines) + '{"iteration": 2, "pha', encoding="utf-8")


def test_a_run_is_in_proportion_to_itself_and_to_larger_ones(run):
    write_log(run)
    s = run.cfg.scaling(measured=run, gpus=(1, 2))
    texts = lambda c: sum(drawn * times for _, drawn, times in texts_of(c).values())
    assert s.rows[0]["drawing"] * 3600 == pytest.approx(texts(run.cfg))
    assert s.rows[0]["training"] * 3600 == pytest.approx(2 * 1.)
    assert s.rows[0]["rest"] * 3600 == pytest.approx(2 * 1. + 3 * 3. + 5)
    assert "peak" not in s.rows[0] and "as measured" in repr(s)
    large = run.cfg.replace(n_train=2000, n_test=800, iterations=5, part_size=1)
    big = large.scaling(measured=run, gpus=(1, 100))
    assert big.rows[0]["drawing"] * 3600 == pytest.approx(texts(large))
    assert big.rows[0]["training"] * 3600 == pytest.approx(100 * 5 * 1.)
    assert big.rows[0]["rest"] * 3600 == pytest.approx(100 * 5 * 1. + 100 * 6 * 3. + 5)
    assert big.rows[1]["drawing"] == pytest.approx(big.rows[0]["drawing"] / 100)


def test_what_a_run_cannot_tell_is_refused(run, tmp_path):
    from stasc.loop import STaSC
    write_log(run)
    with pytest.raises(ConfigError, match="finetune is 'lora' there and 'full' here"): run.cfg.replace(finetune="full").scaling(measured=run)
    write_log(run, lambda e: e | dict(engines=2) if e["phase"] == "load" else e)
    with pytest.raises(ConfigError, match="several engines or processes"): run.cfg.scaling(measured=run)
    write_log(run, lambda e: e | dict(processes=2) if e["phase"] == "train" else e)
    with pytest.raises(ConfigError, match="several engines or processes"): run.cfg.scaling(measured=run)
    (run.dir / "log.jsonl").write_text('[1]\nnull\n"x"\n{}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="has no times for initial.train"): run.cfg.scaling(measured=run)
    (run.dir / "log.jsonl").unlink()
    with pytest.raises(ConfigError, match="has no times for"): run.cfg.scaling(measured=run)
    with pytest.raises(ConfigError, match="has not finished M_1"): run.cfg.scaling(measured=STaSC(run.cfg, tmp_path / "new", data=run.data, callbacks=[]))


def test_a_real_log_will_do(tmp_path, run):
    from stasc.loop import STaSC
    from stasc.train import ScriptedEngine
    for variant in ("EIE", "FIE"):
        made = STaSC(run.cfg.replace(variant=variant), tmp_path / variant, data=run.data, engine=ScriptedEngine(guess), callbacks=[]).run()
        s = made.cfg.scaling(measured=made)
        assert 0 < s.limit <= s.rows[0]["hours"] and s.worth >= 1
        assert s.rows[0]["drawing"] * 3600 == pytest.approx(sum(v for (_, phase), v in made.timing().seconds.items() if "." in phase))


def test_texts_that_reach_html_are_escaped_and_the_picture_has_words():
    s = Config.paper(finetune="lora").scaling()
    assert "<script>" not in dataclasses.replace(s, notes=["<script>alert(1)</script>", *s.notes])._repr_html_()
    alt = s.figure().alt
    assert all(f"{r['gpus']} {r['hours']:.3g}" in alt for r in s.rows)


# --- in a terminal, and from the command line

@settings(max_examples=40, deadline=None)
@given(configs(), st.sampled_from(BY), st.integers(60, 140), st.sampled_from([None, 2.5]))
def test_a_terminal_gets_every_word_within_its_width(cfg, by, width, price):
    try: made = [scaling(cfg, "A100 40GB", (1, 2, 4, 8), by, price=price), plan(cfg)]
    except ConfigError: made = [plan(cfg)]
    for s in made:
        sentences, whole = s.text(width).split("\n\n"), repr(s).split("\n\n")
        assert all(len(line) <= width for k in (0, 2) for line in sentences[k].splitlines())
        assert [" ".join(sentences[k].split()) for k in (0, 2)] == [" ".join(whole[k].split()) for k in (0, 2)]
        assert sum(map(len, sentences[1].split())) == sum(map(len, whole[1].split()))               # headings are folded, nothing is left out
        assert max(map(len, sentences[1].splitlines())) <= width or s.text(1).split("\n\n")[1] == sentences[1]     # or it is as narrow as it gets
        assert s.text() == repr(s) and s.text(10_000) == repr(s)


def test_command_says_what_more_gpus_bring_and_writes_nothing(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paper = "plan", "--preset", "paper", "--finetune", "lora"
    done = command(*paper, "--gpus", "8,1,2,2", "--gpu", "L4", "--by", "both", "--price", "1.5", "--prompt-tokens", "600")
    assert done.code == 0 and done.out.strip() == repr(Config.paper(finetune="lora").scaling("L4", (1, 2, 8), "both", price=1.5, prompt=600))
    assert command(*paper, "--gpus", "999999").out.strip() == repr(Config.paper(finetune="lora").scaling(gpus=(999999,)))
    assert not list(tmp_path.iterdir())


WRONG = "0", "-1", "1,x", "", "1,,2", "1,", ",1", "1 2", "01", "1.5", "1e3", "²", "٣", "1000000", "9" * 400, "1,2\n"


@pytest.mark.parametrize("words, says", [
    *[([f"--gpus={n}"], "expected whole numbers from 1 to 999999 with commas between them") for n in WRONG],
    ("--gpus", "expected one argument"), ("--gpus 1,2 --gpu H9000", "unknown gpu 'H9000' (known: T4"), ("--gpus 1,2 --by dask", "invalid choice: 'dask'"),
    *[(f"--gpus 1 --price {p}", f"price = {float(p)}: expected a number of at least 0") for p in ("nan", "inf", "-1")], ("--gpus 1 --price cheap", "argument --price"),
    *[(o, f"{o.split()[0]} is for several GPUs; give their numbers too, such as --gpus 1,2,4,8") for o in ("--by ray", "--price 0", "--measured x")],
    *[(f"--gpus 1 --measured x {o}", f"{o.split()[0]} is not for --measured") for o in ("--gpu T4", "--prompt-tokens 5", "--first-tokens 5")],
    ("--gpus 1 --measured nowhere", "nowhere is not a run directory"), ("--gpus 1 --measured=", "not a run directory"),
    ("--gpus 1 --gpu T4 --preset paper --model Qwen/Qwen2.5-7B", "however many there are")], ids=lambda x: str(x)[:40])
def test_a_wrong_word_is_answered_in_one_sentence(capsys, words, says):
    from stasc.cli import main
    try: code = main(["plan", *(words.split() if isinstance(words, str) else words)])
    except SystemExit as e: code = e.code                               # of the parser
    said = capsys.readouterr()
    assert code == 2 and says in said.err and said.err.count("\n") == 1 and not said.out


def test_a_measured_run_gives_times_and_settings(command, run, tmp_path):
    write_log(run)
    before = {f: f.read_bytes() for f in run.dir.path.rglob("*") if f.is_file()}
    done = command("plan", "--gpus", "1,2", "--measured", run.dir.path, "--n-train", 2000, "--by", "both")
    large = run.cfg.replace(n_train=2000)
    assert done.code == 0 and done.out.strip() == repr(large.scaling(measured=run, gpus=(1, 2), by="both")) and "2,000 training questions, as measured" in done.out
    assert {f: f.read_bytes() for f in run.dir.path.rglob("*") if f.is_file()} == before
    said = command("plan", "--gpus", 1, "--measured", run.dir.path, "--preset", "paper")
    assert said.code == 2 and "model is " in said.err and said.err.count("\n") == 1
    (empty := tmp_path / "empty").mkdir()
    (empty / "config.json").write_bytes((run.dir / "config.json").read_bytes())
    said = command("plan", "--gpus", 1, "--measured", empty)
    assert said.code == 2 and "has not finished M_1" in said.err and said.err.count("\n") == 1


@pytest.mark.parametrize("change", [lambda e: e | dict(seconds=0., model_seconds=0.), lambda e: e | dict(seconds=-1.), lambda e: e | dict(seconds=float("nan")), lambda e: e | dict(seconds=1e999), lambda e: e | dict(engines="x")])
def test_times_that_none_can_be_are_refused(run, change):
    write_log(run, change)
    with pytest.raises(ConfigError, match="measured: ") as e: run.cfg.scaling(measured=run)
    assert "\n" not in str(e.value)


def test_a_measured_run_needs_no_model_at_hand(run):
    write_log(run)
    named = dataclasses.replace(run.cfg, model="nobody/has-this-9b")
    run.cfg, own = named, run.cfg
    try: assert named.scaling(measured=run, gpus=(1,)).rows[0]["hours"] > 0
    finally: run.cfg = own
