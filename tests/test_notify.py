"Words reach people, once and in time, and whatever the services do never reaches whoever tells them."
import json
import logging
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import SimpleQueue

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from delta_go.domain import InputError
from delta_go.live.notify import (LONGEST, Lane, Line, Mailbox, Manners, Notifier, open_service, presentable, read_urls,
                                  scheme_of)
from tests.waiting import FOREVER, SOON, wait_for

TOKEN = "t0ken-that-nobody-may-see"
SMALL = Manners(held=5, fold=30.0, letters=4, reserve=2, every=20.0, size=100, again=(5.0, 60.0))
QUICK = Manners(answer=0.3, again=(0.05, 0.1))

# the box, under a clock that only moves when told

STEPS = st.lists(st.tuples(
    st.sampled_from([0.0, 0.0, 1.0, 7.0, 31.0, 200.0]),      # seconds that pass
    st.sampled_from("abcdefgh"), st.booleans(),              # what is told
    st.booleans(), st.booleans()), min_size=1, max_size=60)  # whether a letter is asked for, and whether it arrives


@settings(max_examples=150)
@given(STEPS)
def test_every_telling_arrives_waits_or_is_counted_and_letters_are_few(steps):
    now, box, arrived, went = 0.0, Mailbox(SMALL, 0.0), [], []
    for number, (seconds, words, urgent, ask, arrives) in enumerate(steps, 1):
        now += seconds
        box.put(words * 20, urgent, now)
        letter = box.take(now) if ask else ()
        if letter:
            went.append((now, letter))
            assert len({(line.words, line.urgent) for line in letter}) == len(letter)
            assert sorted(letter, key=lambda line: not line.urgent) == list(letter)
            if arrives:
                arrived.extend(letter)
            else:
                box.give_back(letter, now)
        waiting = sum(line.count for line in box.waiting.values())
        assert sum(line.count for line in arrived) + waiting + box.dropped == number
        assert len(box.waiting) <= SMALL.held
        assert all(line.tries <= len(SMALL.again) for line in box.waiting.values())
    for start, _ in went:
        after = [at for at, _ in went if at >= start]
        assert all(n <= SMALL.letters + (at - start) / SMALL.every + 1e-6 for n, at in enumerate(after, 1))


@settings(max_examples=100)
@given(STEPS)
def test_after_the_wait_there_is_a_letter_and_not_before(steps):
    now, box = 0.0, Mailbox(SMALL, 0.0)
    for seconds, words, urgent, ask, arrives in steps:
        now += seconds
        box.put(words, urgent, now)
        wait = box.wait(now)
        assert wait is not None
        if wait > 1e-6:
            assert not box.take(now)
            assert not box.take(now + wait * 0.99)
        if ask:
            now += wait + 1e-6
            letter = box.take(now)
            assert letter
            if not arrives:
                box.give_back(letter, now)


@settings(max_examples=100)
@given(STEPS)
def test_words_that_arrived_do_not_go_again_before_their_time(steps):
    now, box, seen = 0.0, Mailbox(SMALL, 0.0), {}
    for seconds, words, urgent, _, _ in steps:
        now += seconds
        box.put(words, urgent, now)
        for line in box.take(now):
            last = seen.get((line.words, line.urgent), -1e9)
            assert now - last >= SMALL.fold
            seen[line.words, line.urgent] = now


@settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 30), st.booleans()), max_size=60))
def test_no_urgent_line_is_forgotten_while_chatter_waits(told):
    box, forgotten = Mailbox(SMALL, 0.0), 0
    for at, (number, urgent) in enumerate(told):
        before, had = dict(box.waiting), box.dropped
        box.put(str(number), urgent, float(at))
        if box.dropped > had:
            gone = [line for key, line in before.items() if key not in box.waiting]
            forgotten += sum(line.count for line in gone)
            if any(line.urgent for line in gone):
                assert all(line.urgent for line in box.waiting.values())


def test_chatter_leaves_the_reserve_to_urgent_lines():
    box = Mailbox(Manners(), 0.0)
    sent = 0
    for number in range(50):
        box.put(f"chatter {number}", False, 0.0)
        sent += bool(box.take(0.0))
    assert sent == 3
    for number in range(50):
        box.put(f"alarm {number}", True, 0.0)
        sent += bool(box.take(0.0))
    assert sent == 6
    assert box.wait(0.0) == pytest.approx(180.0)


def test_words_told_while_their_letter_is_under_way_join_it_when_it_comes_back():
    box = Mailbox(SMALL, 0.0)
    box.put("flat", True, 0.0)
    letter = box.take(0.0)
    box.put("flat", True, 2.0)
    box.put("flat", True, 3.0)
    box.give_back(letter, 4.0)
    assert box.take(8.9) == ()
    (line,) = box.take(9.0)
    assert (line.count, line.again, line.text(9.0)) == (3, False, "flat (3 times)")


@pytest.mark.parametrize(("line", "now", "text"), [
    (Line("x", False, 0, 0), 59, "x"), (Line("x", False, 0, 0), 60, "x (1 min ago)"),
    (Line("x", False, 0, 0, 2), 0, "x (2 times)"), (Line("x", False, 0, 0, 1, True), 0, "x (once more)"),
    (Line("x", False, 0, 0, 12, True), 130, "x (12 times more, first 2 min ago)")])
def test_a_line_says_how_often_and_how_late(line, now, text):
    assert line.text(now) == text


@pytest.mark.parametrize("wrong", [{"held": 0}, {"letters": 0}, {"letters": 2, "reserve": 2}, {"reserve": -1}, {"size": 0},
                                   {"fold": -1.0}, {"every": 0.0}, {"answer": 0.0}, {"again": (5.0, -1.0)}])
def test_manners_that_cannot_be_kept_are_refused(wrong):
    with pytest.raises(InputError, match="manners"):
        Manners(**wrong)


# words and addresses

@pytest.mark.parametrize(("text", "urls"), [
    ("", ()), (" , ,\n", ()), ("json://a", ("json://a",)), ("json://a,json://b", ("json://a", "json://b")),
    ("json://a, json://b\tjson://a", ("json://a", "json://b")), ("mailto://u:p@h?to=a@x,b@y,json://c,", ("mailto://u:p@h?to=a@x,b@y", "json://c")),
    ("rubbish json://a", ("rubbish", "json://a"))])
def test_addresses_are_read_from_a_setting(text, urls):
    assert read_urls(text) == urls


@given(st.text(max_size=200))
def test_any_setting_reads_and_reads_again_the_same(text):
    urls = read_urls(text)
    assert read_urls(" ".join(urls)) == urls
    assert all(url and not url[0].isspace() for url in urls)


@given(st.text(max_size=700), st.text(min_size=1, max_size=20))
def test_no_secret_is_left_in_a_line(words, secret):
    line = presentable(words + secret + words, (secret, ""))
    assert len(line) <= LONGEST
    assert "\n" not in line
    line.encode()
    if "*" not in secret and len(secret.strip()) > 3 and secret == " ".join(secret.split()):
        assert secret not in line.replace("***", "\0")


def test_a_secret_inside_a_longer_one_leaves_nothing_behind():
    assert presentable("key abcdef, abc, a%2Fb", ("abc", "abcdef", "a/b")) == "key ***, ***, ***"


@pytest.mark.parametrize("url", [f"nothing://{TOKEN}", TOKEN, "", f"slack://{TOKEN}", f"tgram://{TOKEN}", f"json://:{TOKEN}@/", f"{TOKEN}://x"])
def test_a_wrong_address_is_named_by_place_and_scheme_only(url, caplog, capfd):
    with caplog.at_level(0), pytest.raises(InputError) as caught:
        Notifier(("json://127.0.0.1:9", url))
    assert "entry 2" in str(caught.value)
    assert (scheme_of(url) or "no scheme") in str(caught.value)
    shown = str(caught.value) + caplog.text + "".join(capfd.readouterr())
    assert TOKEN not in shown


# real services on this machine

@contextmanager
def service(answer):
    "A server that notes what is posted and then does as `answer(handler)` says; also the address and the notes."
    posted = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            answer(self)

        def do_GET(self):
            posted.append("GET")
            answer(self)

        def log_message(self, *words):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.block_on_close = True, False
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"json://127.0.0.1:{server.server_port}/{TOKEN}/", posted
    finally:
        server.shutdown()
        server.server_close()


def answers(code, **headers):
    def answer(handler):
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", "0")
        handler.end_headers()
    return answer


def silent(seconds):
    return lambda handler: time.sleep(seconds)


def trickles(handler):
    "Bytes come often enough for any read timeout, and never end."
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    try:
        for _ in range(60):
            handler.wfile.write(b"x")
            time.sleep(0.05)
    except OSError:
        pass


@contextmanager
def refusing():
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    yield f"json://127.0.0.1:{port}/{TOKEN}/", []


def test_what_is_told_arrives_as_it_was_said():
    with service(answers(200)) as (url, posted):
        notifier = Notifier((url,), "delta_go paper", secrets=("hunter2",))
        notifier.tell("BTCUSD: <b>12</b> & *more* :smile: \\n, key hunter2", urgent=True)
        assert wait_for(lambda: posted)
        notifier.close()
    assert (posted[0]["title"], posted[0]["type"]) == ("delta_go paper: urgent", "warning")
    assert posted[0]["message"] == "BTCUSD: <b>12</b> & *more* :smile: \\n, key ***"
    assert (notifier.failures, notifier.dropped, notifier.trouble) == (0, 0, "")


def test_a_crowd_becomes_few_letters_and_closing_sends_the_rest():
    with service(answers(200)) as (url, posted):
        notifier = Notifier((url,))
        for number in range(97):
            notifier.tell(f"complaint {number}")
        assert wait_for(lambda: posted)
        notifier.close(5)
    lines = "\n".join(post["message"] for post in posted).splitlines()
    assert sorted(lines) == sorted(f"complaint {number}" for number in range(97))
    assert len(posted) <= 8
    assert notifier.dropped == 0


@pytest.mark.parametrize(("broken", "words"), [
    (lambda: service(answers(500)), "it answered 500"), (lambda: service(silent(FOREVER)), "no answer within 0.3 s"),
    (lambda: service(trickles), "no answer within 0.3 s"), (refusing, "it could not be reached or did not accept"),
    (lambda: service(answers(302, Location="/elsewhere")), "it answered 302")])
def test_a_broken_service_costs_the_other_service_nothing(broken, words, caplog, capfd):
    with caplog.at_level(0), broken() as (bad, asked), service(answers(200)) as (good, posted):
        notifier = Notifier((bad, good), "paper", manners=QUICK)
        for number in range(2000):
            notifier.tell(f"{number % 3}, see {bad}", urgent=number == 1000)
        assert wait_for(lambda: any("urgent" in post["title"] for post in posted))
        assert wait_for(lambda: notifier.failures >= 1)
        assert words in notifier.trouble
        notifier.close(5.0)
    assert notifier.dropped == 2000
    assert "GET" not in asked
    assert TOKEN not in caplog.text + "".join(capfd.readouterr()) + notifier.trouble + json.dumps(posted)


def test_whoever_tells_waits_for_no_service():
    "Telling and closing end while the service still keeps silent."
    with service(silent(FOREVER)) as (url, posted):
        notifier = Notifier((f"{url}?rto={FOREVER:g}",), manners=Manners(answer=FOREVER))  # the library itself would wait four seconds
        notifier.tell("under way", urgent=True)
        assert wait_for(lambda: posted)
        began = time.monotonic()
        for number in range(2000):
            notifier.tell(f"{number % 3}", urgent=number == 1000)
        notifier.close(1.0)
        assert time.monotonic() - began < SOON
    assert (len(posted), notifier.dropped) == (1, 2001)


def test_a_service_that_recovers_gets_what_it_missed():
    recovered = threading.Event()

    def answer(handler):
        if len(posted) > 1:
            recovered.wait(FOREVER)
        answers(500 if len(posted) == 1 else 200)(handler)

    with service(answer) as (url, posted):
        notifier = Notifier((f"{url}?rto={FOREVER:g}",), manners=Manners(answer=FOREVER, again=(0.2, 0.2, 0.2)))
        notifier.tell("HALTED", urgent=True)
        assert wait_for(lambda: len(posted) == 2)
        assert notifier.failures == 1 and "500" in notifier.trouble
        recovered.set()
        assert wait_for(lambda: len(posted) == 2 and not notifier.trouble)
        notifier.close()
    assert [post["message"] for post in posted] == ["HALTED", "HALTED"]
    assert (notifier.failures, notifier.dropped) == (1, 0)


def test_tries_end():
    with service(answers(500)) as (url, posted):
        notifier = Notifier((url,), manners=QUICK)
        notifier.tell("HALTED", urgent=True)
        assert wait_for(lambda: notifier.dropped == 1)
        time.sleep(0.2)
        assert len(posted) == notifier.failures == 3
        notifier.close()


def test_letters_that_hang_are_few():
    release, before = threading.Event(), set(threading.enumerate())
    with service(lambda handler: release.wait(10)) as (url, posted):
        notifier = Notifier((url,), manners=Manners(answer=0.05, letters=20, reserve=0, again=(0.0,)))
        for number in range(8):
            notifier.tell(f"alarm {number}", urgent=True)
            time.sleep(0.06)
        assert wait_for(lambda: "still hang" in notifier.trouble)
        assert sum(thread.name == "notify-letter" for thread in set(threading.enumerate()) - before) <= 3
        release.set()
        notifier.close(0.1)
    assert len(posted) <= 3


def test_whatever_is_told_raises_nothing():
    class Odd:
        def __str__(self):
            raise RuntimeError("no words")

    with service(answers(200)) as (url, posted):
        notifier = Notifier((url,))
        for words in ("", "\ud800 \x00 \x1b[31m", "x" * 100_000, None, 5, b"bytes", Odd()):
            notifier.tell(words, urgent=True)
        notifier.close()
        notifier.close()
        notifier.tell("too late")
    assert notifier.dropped == 2
    assert max(len(post["message"]) for post in posted) < 2500


@pytest.mark.parametrize("failing", [SystemExit, KeyboardInterrupt, MemoryError, ValueError])
def test_a_library_that_raises_is_a_failure_like_any_other(failing):
    def send(title, text, urgent):
        raise failing(TOKEN)

    inlet = SimpleQueue()
    lane = Lane("1 (fake)", send, "", Manners(), inlet)
    lane.box.put("flat", False, time.monotonic())
    lane.step(time.monotonic(), False)
    inlet.get(timeout=SOON)(time.monotonic())
    assert (lane.failures, lane.trouble) == (1, f"it raised {failing.__name__}")
    assert [line.tries for line in lane.box.waiting.values()] == [1]


def test_without_addresses_there_is_only_the_log(caplog):
    before = set(threading.enumerate())
    with caplog.at_level(logging.INFO, "delta_go.notify"):
        notifier = Notifier(read_urls(""), secrets=(TOKEN,))
        notifier.tell(f"bought, {TOKEN}")
        notifier.tell("HALTED", urgent=True)
        notifier.close()
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [("INFO", "bought, ***"), ("WARNING", "HALTED")]
    assert set(threading.enumerate()) <= before and (notifier.dropped, notifier.failures) == (0, 0)


def test_the_library_is_loaded_only_where_there_is_an_address():
    code = "import sys; from delta_go.live.notify import Notifier; Notifier(()).tell('x'); print('apprise' in sys.modules, 'requests' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False False\n"


def test_a_service_that_hangs_does_not_keep_the_program_from_ending():
    code = """if True:
        import sys, time
        from delta_go.live.notify import Notifier
        notifier = Notifier(sys.argv[1:])
        notifier.tell("flat", urgent=True)
        time.sleep(1.0)
        print(time.time(), flush=True)
        notifier.close(0.2)
    """
    with service(silent(FOREVER)) as (url, posted):
        ended = subprocess.run([sys.executable, "-X", "dev", "-c", code, f"{url}?rto={FOREVER:g}"], capture_output=True, text=True, check=True)
        took = time.time() - float(ended.stdout)
    assert posted
    assert took < SOON
    assert TOKEN not in ended.stderr


def test_a_signal_may_tell_while_something_is_being_told():
    code = """if True:
        import signal, sys, time
        from delta_go.live.notify import Notifier
        notifier = Notifier(sys.argv[1:])
        told = []
        signal.signal(signal.SIGALRM, lambda *_: (told.append(1), notifier.tell("kill asked", urgent=True)))
        signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
        end = time.monotonic() + 0.7
        while time.monotonic() < end:
            notifier.tell("chatter")
        signal.setitimer(signal.ITIMER_REAL, 0)
        notifier.close(5)
        print(len(told) > 50, notifier.dropped, notifier.failures)
    """
    with service(answers(200)) as (url, posted):
        ended = subprocess.run([sys.executable, "-c", code, url], capture_output=True, text=True, check=True, timeout=FOREVER)
    assert ended.stdout.startswith("True ")
    assert ended.stdout.endswith(" 0\n")
    assert any("kill asked" in post["message"] for post in posted)


def test_a_service_opened_twice_is_the_same_to_the_reader():
    with service(answers(200)) as (url, posted):
        assert [open_service(url, 1)("t", "one", False), open_service(url, 2)("t", "two", True)] == ["", ""]
    assert [(post["message"], post["type"]) for post in posted] == [("one", "info"), ("two", "warning")]
