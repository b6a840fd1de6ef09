"Attacks on `stasc.runner`: programs that do not end, that eat, that lie, that reach out of their folder."
import os, subprocess, sys, threading, time
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings, strategies as st

from stasc.runner import ANSWER, _unshare, code_block, code_reward, isolation, run_code

TESTS = "assert f(2) == 4"
GOOD = "def f(n): return n + n"
posix = pytest.mark.skipif(os.name != "posix", reason="resource limits and process groups are Unix")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit on memory holds on Linux")


def why(program, tests=TESTS, seconds=20, **kw):
    "What a program that must not pass failed of."
    v = run_code(program, tests, seconds, **kw)
    assert not v.passed, program
    assert v.why and len(v.why) < 300
    return v.why


def passes(program, tests=TESTS): return run_code(program, tests, seconds=60).passed


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path, monkeypatch):
    "No child and no folder outlives a test."
    import tempfile
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    me, before = psutil.Process(), threading.active_count()
    children = {c.pid for c in me.children(recursive=True)}
    yield
    assert {c.pid for c in me.children(recursive=True)} <= children and threading.active_count() == before
    assert not list(tmp_path.glob("stasc-*"))


def test_right_and_wrong():
    assert passes(GOOD) and run_code(GOOD, TESTS, seconds=60).why == ""
    assert why("def f(n): return n") == "tests: AssertionError"
    assert why("def g(n): return 2 * n").startswith("tests: NameError")
    assert why("def f(n) return 4").startswith("answer: SyntaxError")
    assert why("") .startswith("tests: NameError")
    assert why(GOOD, TESTS + "\nassert f(2) == 5") == "tests: AssertionError"
    assert passes("import math, re, collections, itertools, heapq, functools, typing, datetime, random, json, string, dataclasses, decimal, fractions, bisect\n" + GOOD)


@pytest.mark.parametrize("program", ["import sys; sys.exit(0)", "exit(0)", "quit()", "raise SystemExit", "raise SystemExit(0)", "import os; os._exit(0)", "raise KeyboardInterrupt",
                                     "import os, signal; signal.raise_signal(signal.SIGABRT)", "import sys; sys.exit = print\nraise BaseException('passed')"])
def test_leaving_early_is_not_passing(program):
    why(program)
    why(f"def f(n):\n    {program.splitlines()[-1] if 'import' not in program else program.splitlines()[0]}")


@pytest.mark.parametrize("marker", ['print("passed")', 'print(\'{"key": "", "why": ""}\')', 'import sys; sys.stderr.write("OK"); sys.stdout.write("1.0"); sys.stdout.flush()',
                                    'import os\nfor fd in range(64):\n    try: os.write(fd, b\'{"key": "x", "why": ""}\')\n    except OSError: pass',
                                    'import os\nfor fd in range(64):\n    try: os.write(fd, b\'{"key": null, "why": ""}\' * 999)\n    except OSError: pass',
                                    'import os\nfor fd in range(64):\n    try: os.write(fd, b"[1]")\n    except OSError: pass'])
def test_a_printed_success_is_not_passing(marker):
    why(f"{marker}\nimport os\nos._exit(0)")
    why(f"{marker}\ndef f(n): return 0")


def test_an_answer_cannot_close_the_tests_or_the_marker():
    assert passes(GOOD, f"x = 1\n{ANSWER}\n{TESTS}")
    why(f"{ANSWER}\ndef f(n): return 0")
    why('"""', TESTS)
    why("f = lambda n: 0\n'''\n", "'''\nassert f(2) == 4")
    why("if __name__ == '__main__':\n    def f(n): return 4")
    why("class E(Exception):\n    def __str__(self): raise E\ndef f(n): raise E")
    why("import builtins\nbuiltins.AssertionError = Warning\ndef f(n): return 0")


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(60)", "def f(n):\n    while True:\n        try:\n            while True: pass\n        except BaseException: pass",
                                     "class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E",
                                     "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\ntime.sleep(60)"])
def test_what_does_not_end_is_ended(program):
    start = time.perf_counter()
    assert why(program, seconds=0.7) == "not done after 0.7 s"
    assert time.perf_counter() - start < 40


def test_threads_that_go_on_do_not_hold_up_the_verdict():
    assert run_code("import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\n" + GOOD, TESTS, seconds=60).passed


@pytest.mark.parametrize("program", ["import os; os.fork()", "import os\nwhile True: os.fork()", "import subprocess; subprocess.run(['true'])", "import os; os.system('true')",
                                     "import os; os.execv('/bin/true', ['true'])", "import os; os.posix_spawn('/bin/true', ['true'], {})", "import multiprocessing as m; m.Process(target=print).start()",
                                     "import _posixsubprocess", "import ctypes", "import os; os.kill(os.getppid(), 9)", "import pty; pty.fork()",
                                     "import os; os.spawnv(os.P_NOWAIT, '/bin/true', ['true'])"])
@posix
def test_no_other_processes(program): assert "not allowed" in why(program) or "PermissionError" in why(program)


@posix
def test_a_child_that_got_away_dies_with_its_group(monkeypatch):
    "Without the audit hook: the group (or the process tree of its own) is what is killed."
    import stasc.runner
    monkeypatch.setattr(stasc.runner, "_SOURCE", stasc.runner._SOURCE.replace("sys.addaudithook(", "str("))
    for detach in ("", "os.setsid();") if _unshare() else ("",):
        mark = f"{time.time_ns()}"
        why(f"import os, time\nif os.fork() == 0:\n    {detach} os.execv({sys.executable!r}, ['python', '-c', 'import time; time.sleep(60)', '{mark}'])\ntime.sleep(60)", seconds=1)
        gone = time.time() + 5
        while (left := [p for p in psutil.process_iter(["cmdline"]) if mark in (p.info["cmdline"] or [])]) and time.time() < gone: time.sleep(.05)
        assert not left


@pytest.mark.parametrize("program", ["while True: print('x' * 100_000)", "import sys\nwhile True: sys.stderr.write('x' * 100_000)",
                                     "import os\nwhile True:\n    for fd in range(3, 64):\n        try: os.write(fd, b'x' * 1_000_000)\n        except OSError: pass"])
@posix
def test_huge_output_goes_nowhere(program):
    free = psutil.Process().memory_info().rss
    why(program, seconds=1)
    assert psutil.Process().memory_info().rss - free < 64 << 20


def test_much_output_is_no_fault(): assert run_code("print('x' * 50_000_000)\n" + GOOD, TESTS, seconds=60).passed


@pytest.mark.parametrize("program", ["x = bytearray(2 << 30)", "x = []\nwhile True: x.append(bytearray(1 << 20))", "x = 'a' * (1 << 36)", "def f(n): return [0] * (1 << 33)"])
@linux
def test_huge_memory(program): assert "MemoryError" in why(program, seconds=30) or "ended before" in why(program, seconds=30)


@linux
def test_huge_files():
    assert "OSError" in why("f = open('x', 'wb')\nwhile True: f.write(bytes(1 << 20)); f.flush()", seconds=30)


def test_deep_recursion_is_a_wrong_answer():
    assert "RecursionError" in why("def f(n): return f(n)")
    why("import sys\nsys.setrecursionlimit(10**9)\ndef f(n): return f(n)", seconds=20)


@pytest.mark.parametrize("read", ["input()", "int(input())", "open(0).read() + 1", "import sys; int(sys.stdin.readline())", "import sys; int(sys.stdin.buffer.read())"])
def test_standard_input_is_empty(read):
    assert any(k in why(read) for k in ("EOFError", "TypeError", "ValueError"))
    assert passes("import sys, os\nassert sys.stdin.read() == '' and os.read(0, 9) == b''\n" + GOOD)


def test_no_network():
    assert "socket" in why("import socket; socket.create_connection(('127.0.0.1', 9))")
    why("import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')")
    if _unshare():
        code = "import socket\ntry: socket.create_connection(('192.0.2.1', 80), 1)\nexcept OSError as e: print(e.errno)"
        assert "101" in subprocess.run([*_unshare(), sys.executable, "-c", code], capture_output=True, text=True).stdout       # ENETUNREACH
    assert ("of its own" in isolation()) == bool(_unshare()) and "no sandbox" in isolation()


def test_files_outside_of_the_folder_are_safe(tmp_path):
    mine = tmp_path/"mine.txt"
    mine.write_text("dear")
    (tmp_path/"empty").mkdir()
    p, d = repr(str(mine)), repr(str(tmp_path))
    for program in (f"open({p}, 'w')", f"open({p}, 'a')", f"open({p}, 'r+')", f"import os; os.remove({p})", f"import os; os.truncate({p}, 0)", f"import os; os.rename({p}, 'x')",
                    f"import os; os.rename('x', {p})", f"import os; os.symlink({p}, 'x')", f"import os; os.link({p}, 'x')", f"import os; os.chmod({p}, 0)",
                    f"import shutil; shutil.rmtree({d})", f"import os; os.rmdir({d} + '/empty')", f"import os; os.mkdir({d} + '/new')", f"import os; os.chdir({d}); open('mine.txt', 'w')",
                    f"import os; os.chdir({d}); os.remove('mine.txt')", f"import os; os.open({p}, os.O_WRONLY | os.O_TRUNC)", f"import pathlib; pathlib.Path({p}).unlink()",
                    f"import os; fd = os.open({d}, os.O_RDONLY); os.remove('mine.txt', dir_fd=fd)", f"import os; fd = os.open({d}, os.O_RDONLY); os.open('mine.txt', os.O_TRUNC | os.O_WRONLY, dir_fd=fd)",
                    "open('../verdict', 'w')", f"import os; os.utime({p})"):
        why(program)
        assert mine.read_text() == "dear" and (tmp_path/"empty").is_dir() and not (tmp_path/"new").exists(), program
    assert passes("open('x', 'w').write('4'); import os; os.mkdir('d'); os.rename('x', 'd/y'); s = open('d/y').read(); os.remove('d/y'); os.rmdir('d')\ndef f(n): return int(s)")


def test_the_environment_stays_outside(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "abc")
    monkeypatch.setenv("PYTHONSTARTUP", "/nowhere")
    assert passes("import os\nassert 'SECRET_TOKEN' not in os.environ and 'HOME' not in os.environ\n" + GOOD)
    assert "ModuleNotFoundError" in why("import numpy") and "ModuleNotFoundError" in why("import stasc")


@settings(max_examples=15, deadline=None)
@given(st.text(max_size=30) | st.sampled_from(["\0", "\ud800", "#" * 10_000_000, "(" * 100_000, "x = " + "-" * 100_000 + "1", "# coding: nope\n", "9" * 10_000]))
def test_any_text_gives_a_verdict(text): assert not run_code(text, TESTS, seconds=60).passed


def test_an_interrupt_ends_the_child(monkeypatch):
    def stop(*_, **__): raise KeyboardInterrupt
    monkeypatch.setattr(subprocess.Popen, "communicate", stop)
    with pytest.raises(KeyboardInterrupt): run_code(GOOD, TESTS)


def test_the_reward_takes_any_reference_and_runs_a_program_once(tmp_path):
    reward = code_reward()
    assert reward is code_reward() and reward.extract is code_block
    assert reward(GOOD, ["assert f(2) == 5", TESTS]) == 1.0 and reward(GOOD, TESTS) == 1.0 and reward("", [TESTS]) == 0.0 and reward(GOOD, []) == 0.0
    start = time.perf_counter()
    for _ in range(1000): reward(GOOD, [TESTS])
    assert time.perf_counter() - start < 2


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(["Final Answer:", "```", "```python\n", "\n", "x = 1", "`", "~~~", " ", "\r\n"]), max_size=14).map("".join))
def test_any_markup_gives_a_program_or_none(text):
    program = code_block(text)
    assert program is None or program.strip("\r") in text or program in text


def test_long_texts_take_linear_time():
    start = time.perf_counter()
    for text in ("```\n" * 50_000, "`" * 200_000, "Final Answer:" * 20_000, "```" + "x" * 200_000, " " * 200_000, "\n" * 100_000, "```\nx\n" * 50_001): code_block(text)
    assert time.perf_counter() - start < 20
