"""The status page: what it answers, who may stop the bot through it, and how it looks to a reader in a real browser."""
from __future__ import annotations

import sqlite3
import threading
import time

import httpx
import msgspec
import pytest
from bot_folder import DEGRADED, change, make_folder
from browser import chromium

from delta_go.domain import InputError
from delta_go.live import dashboard
from delta_go.live.dashboard import Story, catch_up, make_dashboard, make_door, open_server, start_in_thread
from delta_go.live.journal import entry_of, open_journal, read_journal
from delta_go.live.status import KILL, Status, ask_kill, kill_asked
from delta_go.market.venue import PRODUCTS
from delta_go.serving.telemetry import register_secret
from delta_go.trading.intents import SECOND, Entry

KEY, SECRET = "right-key-0123456789-0123456789-ab", "planted-secret-9f8e7d6c5b4a39281706"
HOSTILE = f"<script>window.owned = 1</script><img src=x onerror='window.owned = 1'> {SECRET}"
GETS = ("/", "/status.json", "/chart.json?symbol=BTCUSD", "/decisions.json", "/trades.json", "/metrics", "/health/live", "/health/ready")


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """Folder and status."""
    register_secret(SECRET)
    place = tmp_path_factory.mktemp("bot")
    return place, make_folder(place, hostile=HOSTILE, stop=False)


@pytest.fixture
def bot(said):
    """The folder as fresh as new: running, nobody has asked to stop."""
    place, status = said
    (place / KILL).unlink(missing_ok=True)
    change(place, status)
    return place, status


def client(place, host="127.0.0.1", key=KEY, clock=time.time):
    """A browser without a screen."""
    return make_dashboard(place, make_door(host, key), clock).test_client()


# ---- what it answers

def test_every_address_answers_and_is_closed_to_others(bot):
    for path in GETS:
        reply = client(bot[0]).get(path)
        assert reply.status_code == 200, (path, reply.text)
        assert reply.headers["X-Content-Type-Options"] == "nosniff" and reply.headers["Cache-Control"] == "no-store"
        assert "default-src 'none'" in reply.headers["Content-Security-Policy"] and "frame-ancestors 'none'" in reply.headers["Content-Security-Policy"]
        assert not [name for name, _ in reply.headers if name.lower().startswith("access-control")]
        assert SECRET not in reply.text


def test_problems_are_problems(bot):
    page = client(bot[0])
    for reply, status in ((page.get("/nothing"), 404), (page.post("/"), 405), (page.get("/kill"), 405), (page.get("/chart.json?symbol=<b>"), 404), (page.get("/chart.json"), 404),
                          (page.post("/kill", data=b"{", headers={"X-API-Key": KEY}), 400), (page.post("/kill", data=b"x" * 9000, headers={"X-API-Key": KEY}), 413)):
        assert (reply.status_code, reply.mimetype) == (status, "application/problem+json"), reply.text
        assert reply.json["detail"] and "<b>" not in reply.text


def test_chart_and_decisions_say_what_the_journal_says(bot):
    page, rows = client(bot[0]), [entry_of(row) for row in read_journal(bot[0] / "journal.db")]
    chart = page.get("/chart.json?symbol=ETHUSD").json
    known = {entry.body["time"]: entry.body["regime"] for entry in rows if entry.kind == "decision" and entry.body["symbol"] == "ETHUSD"}
    assert len(chart["time"]) == 200 and chart["regime"] == [known.get(time) for time in chart["time"]] and chart["regime"][:20] == [None] * 20
    assert [(mark["side"], mark["exit_time"] is None) for mark in chart["trades"]] == [("sell", False), ("buy", False), ("sell", True)]
    decisions = page.get("/decisions.json").json["decisions"]
    assert len(decisions) == 50 and [row["time"] for row in decisions] == sorted((row["time"] for row in decisions), reverse=True)
    assert [row["refused"] for row in decisions if row["refused"]] == ["quota: 9,750 of 10,000 used; entries wait"]


def test_trades_add_up_to_the_ledger(bot):
    from delta_go.live.flight import ledger_from
    told = client(bot[0]).get("/trades.json").json
    entries = [entry_of(row) for row in read_journal(bot[0] / "journal.db")]
    ledger = ledger_from(entries, PRODUCTS, next(entry.body["equity"] for entry in entries if entry.kind == "equity"))
    assert [row["pnl"] for row in told["trades"]] == [trade.pnl for trade in ledger][::-1] and len(ledger) == 6
    assert told["summary"]["net"] == pytest.approx(sum(trade.pnl for trade in ledger)) and len(told["equity"]) == 180


@pytest.mark.parametrize("fields, ready", [({}, True), (DEGRADED, True), ({"state": "HALTED"}, False), ({"state": "BOOT"}, False), ({"state": "DRAIN"}, False), ({"state": "STOPPED"}, False)])
def test_ready_is_what_a_supervisor_may_rely_on(bot, fields, ready):
    change(*bot, **fields)
    assert client(bot[0]).get("/health/ready").status_code == (200 if ready else 503)
    assert client(bot[0], clock=lambda: time.time() + 31).get("/health/ready").status_code == 503
    assert client(bot[0]).get("/health/live").status_code == 200


def test_metrics_name_everything_from_the_first_scrape(bot, tmp_path):
    numbers = client(bot[0]).get("/metrics").text
    for line in ("delta_go_bot_naked_positions 1.0", "delta_go_bot_positions 2.0", 'delta_go_bot_state{state="RUNNING"} 1.0', 'delta_go_bot_state{state="HALTED"} 0.0',
                 'delta_go_bot_cause{cause="disk"} 0.0', 'delta_go_bot_breaker{position="closed",service="hmm-detector"} 1.0', "delta_go_bot_quota_used_ratio 0.12", "delta_go_bot_ready 1.0"):
        assert line in numbers
    nobody = client(tmp_path).get("/metrics").text
    assert "delta_go_bot_heartbeat_age_seconds +Inf" in nobody and 'delta_go_bot_state{state="HALTED"} 0.0' in nobody and "delta_go_bot_ready 0.0" in nobody


def test_empty_and_garbled_folders_are_said(tmp_path):
    page = client(tmp_path)
    assert page.get("/status.json").json["headline"]["title"] == "NO BOT YET" and page.get("/decisions.json").status_code == 503 and page.get("/").status_code == 200
    (tmp_path / "status.json").write_text("{")
    (tmp_path / "windows.json").write_text("nonsense")
    (tmp_path / "journal.db").write_bytes(b"not a database at all, but long enough to look" * 30)
    told = page.get("/status.json").json
    assert told["headline"]["title"] == "NOT READABLE" and told["notes"][0]["name"] == "journal"


def test_a_clock_set_back_does_not_revive_the_dead(bot):
    assert "NO WORD" in client(bot[0], clock=lambda: time.time() - 600).get("/status.json").json["headline"]["title"]


def test_story_grows_with_its_journal_and_starts_again_with_another(tmp_path):
    path, story = tmp_path / "journal.db", Story()
    for name in ("first", "second"):
        journal, _ = open_journal(path, 1, name)
        for number in range(3):
            journal.append([Entry("equity", str(number), {"time": number, "equity": 1e4 + number})], number * SECOND)
            story = catch_up(story, path)
            assert (len(story.equity), story.last.sequence, story.fault) == (number + 1, number + 2, "")
        journal.close()
        for file in tmp_path.glob("journal*"):
            file.unlink()


def test_changed_row_is_told(tmp_path):
    path = tmp_path / "journal.db"
    journal, _ = open_journal(path, 1, "test")
    story = catch_up(Story(), path)
    journal.append([Entry("equity", "1", {"time": 1, "equity": 1e4})], 1)
    journal.close()
    with sqlite3.connect(path) as database:
        database.execute("DROP TRIGGER no_update")
        database.execute("UPDATE journal SET body = replace(body, '10000.0', '20000.0')")
    assert "does not follow" in catch_up(story, path).fault


# ---- who may look, who may stop it

@pytest.mark.parametrize("headers, status", [
    ({}, 401), ({"X-API-Key": "x" * 34}, 401), ({"X-API-Key": KEY[:-1]}, 401), ({"X-API-Key": KEY, "Origin": "https://evil.example"}, 403), ({"X-API-Key": KEY, "Origin": "null"}, 403),
    ({"X-API-Key": KEY, "Sec-Fetch-Site": "cross-site"}, 403), ({"X-API-Key": KEY, "Sec-Fetch-Site": "same-site"}, 403), ({"X-API-Key": KEY, "Host": "evil.example"}, 403),
    ({"X-API-Key": KEY}, 202), ({"X-API-Key": KEY, "Origin": "http://localhost", "Sec-Fetch-Site": "same-origin"}, 202)])
def test_kill_wants_the_key_given_here_on_purpose(bot, headers, status):
    reply = client(bot[0]).post("/kill", json={"who": "Asha", "why": "too\nwild"}, headers=headers)
    assert reply.status_code == status and kill_asked(bot[0]) == ("Asha, from the dashboard: too wild" if status == 202 else None)


def test_kill_by_form_and_never_by_a_password_the_browser_keeps(bot):
    page = client(bot[0], host="0.0.0.0")
    assert page.post("/kill", auth=("any", KEY)).status_code == 401 and kill_asked(bot[0]) is None
    assert page.post("/kill", auth=("any", KEY), data={"key": KEY, "who": "form"}).status_code == 202 and kill_asked(bot[0]) == "form, from the dashboard"


def test_kill_keeps_the_first_words_and_tells_no_secret(bot):
    ask_kill(bot[0], "the first")
    reply = client(bot[0]).post("/kill", json={"who": SECRET}, headers={"X-API-Key": KEY})
    assert reply.status_code == 202 and kill_asked(bot[0]) == "the first" and SECRET not in reply.text


def test_kill_without_a_key_says_how(bot):
    reply = client(bot[0], key=None).post("/kill", json={}, headers={"X-API-Key": KEY})
    assert reply.status_code == 403 and "DELTA_DASHBOARD_KEY" in reply.json["detail"] and kill_asked(bot[0]) is None


def test_kill_that_cannot_be_written_is_not_claimed(bot, tmp_path):
    reply = client(tmp_path / "absent").post("/kill", json={}, headers={"X-API-Key": KEY})
    assert reply.status_code == 500 and "NOT told" in reply.json["detail"]


@pytest.mark.parametrize("path", GETS)
def test_public_address_asks_for_the_key(bot, path):
    page = client(bot[0], host="0.0.0.0")
    open_to_all = path.startswith("/health")
    assert page.get(path).status_code == (200 if open_to_all else 401) and page.get(path, auth=("x", "wrong")).status_code == (200 if open_to_all else 401)
    for words in ({"auth": ("x", KEY)}, {"headers": {"X-API-Key": KEY}}, {"headers": {"Authorization": f"Bearer {KEY}"}}):
        assert page.get(path, headers={"Host": "bot.example", **words.get("headers", {})}, auth=words.get("auth")).status_code == 200


@pytest.mark.parametrize("host, key", [("0.0.0.0", None), ("0.0.0.0", ""), ("192.168.1.4", None), ("127.0.0.1", "short"), ("0.0.0.0", "x" * 31)])
def test_weak_doors_are_not_built(tmp_path, host, key):
    with pytest.raises(InputError, match="DELTA_DASHBOARD_KEY"):
        open_server(tmp_path, host, 0, key)


def test_served_in_a_thread_and_a_taken_port_harms_nobody(bot):
    server = start_in_thread(bot[0], port=0, key=KEY)
    assert httpx.get(f"{server.address}/health/ready", trust_env=False).headers["Server"] == "delta_go"
    with pytest.raises(InputError, match="cannot listen"):
        start_in_thread(bot[0], port=server.port)
    server.stop()
    assert not {"bot", "executor"} & {name for name in vars(dashboard) if not name.startswith("_")}


# ---- in a browser

@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    """One tab of a real Chromium."""
    with chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser.tab()


@pytest.fixture
def page(bot, tab):
    """The page in front of a bot that speaks every half second, and a way to change what it says."""
    server, says, over = start_in_thread(bot[0], port=0, key=KEY), {}, threading.Event()

    def beat():
        while not over.wait(0.3):
            if says.get("silent") is None:
                change(*bot, **{name: value for name, value in says.items()})
    thread = threading.Thread(target=beat)
    thread.start()
    tab.errors.clear()
    tab.size(390, 844)
    tab.open(server.address)
    tab.until("document.querySelectorAll('#charts canvas').length === 3 && document.getElementById('readout-SOLUSD').textContent !== 'no bars yet'")
    yield tab, bot, says, server
    over.set()
    thread.join()
    server.stop()
    tab.open("about:blank#done")


def text(tab, name):
    """What stands in a part of the page."""
    return tab.run(f"document.getElementById('{name}').innerText")


def test_reader_sees_the_bot_on_a_phone(page):
    tab, _, _, _ = page
    assert text(tab, "state") == "RUNNING" and text(tab, "mode").lower() == "paper"
    for width, dark in ((390, False), (320, True), (1280, False)):
        tab.size(width, 844, dark)
        assert tab.run("document.documentElement.scrollWidth") <= width
    assert "NO STOP" in text(tab, "positions") and "NO STOP" in text(tab, "notes") and text(tab, "positions").count("NO STOP") == 1
    assert "quota: 9,750" in text(tab, "decisions") and "trades" in text(tab, "trades") and "advise against" in text(tab, "models") and "[object" not in tab.run("document.body.innerText")
    assert not tab.errors


def test_charts_are_drawn_in_both_schemes(page):
    tab, _, _, _ = page
    count = "[...document.querySelectorAll('#charts canvas')].map(c => new Set(new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer)).size)"
    for dark in (False, True):
        tab.size(1280, 900, dark)
        time.sleep(0.3)
        assert min(tab.run(count)) > 30
    assert "bars of 1h" in tab.run("document.getElementById('canvas-BTCUSD').getAttribute('aria-label')")


def test_text_of_the_journal_stays_text_and_keeps_no_secret(page):
    tab, _, _, server = page
    assert tab.run("window.owned") is None
    raw = httpx.get(f"{server.address}/decisions.json", trust_env=False).text
    assert "<script>window.owned" in raw and SECRET not in raw and SECRET not in tab.run("document.documentElement.outerHTML")
    tab.run("document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.owned = 2'}))")
    assert tab.run("window.owned") is None


def test_causes_and_halt_are_shown(page):
    tab, _, says, _ = page
    says.update(DEGRADED)
    tab.until("document.getElementById('state').textContent === 'DEGRADED'")
    assert "answered 503" in text(tab, "notes") and "not asked" in text(tab, "lines")
    says.update({"state": "HALTED", "halted": "drawdown: 10.2 %"})
    tab.until("document.getElementById('state').textContent === 'HALTED'")
    assert "10.2 %" in text(tab, "words") and tab.run("document.getElementById('top').dataset.level") == "bad"


def test_silence_is_loud(page):
    tab, (place, status), says, _ = page
    says["silent"] = True
    time.sleep(0.4)
    change(place, status, written=time.time() - 75)
    tab.until("document.getElementById('state').textContent.startsWith('NO WORD')")
    assert "min" in text(tab, "beat") or "s ago" in text(tab, "beat")
    assert "BTCUSD" in text(tab, "positions")


def fill(tab, **fields):
    """Type into the dialog."""
    for name, value in fields.items():
        tab.run(f"(() => {{ const f = document.getElementById('kill-form'); f.elements['{name}'].value = {value!r}; f.dispatchEvent(new Event('input', {{bubbles: true}})); }})()")


def test_kill_takes_two_steps_and_the_right_key(page):
    tab, (place, _), says, _ = page
    disabled = "document.getElementById('kill-now').disabled"
    tab.run("document.getElementById('halt').click()")
    assert tab.run("document.getElementById('kill').open") and tab.run(disabled) and kill_asked(place) is None
    fill(tab, key=KEY, typed="halt")
    assert tab.run(disabled)
    fill(tab, typed="HALT", key="wrong-key-0123456789-0123456789-ab", who="Asha", why="test")
    tab.run("document.getElementById('kill-now').click()")
    tab.until("document.getElementById('kill-answer').textContent.startsWith('Refused')")
    assert kill_asked(place) is None
    fill(tab, key=KEY)
    tab.run("document.getElementById('kill-now').click()")
    tab.until("document.getElementById('kill-answer').textContent.startsWith('Asked')")
    assert kill_asked(place) == "Asha, from the dashboard: test"
    tab.until("document.getElementById('state').textContent === 'HALT ASKED'")
    says.update({"state": "HALTED", "halted": "Asha, from the dashboard: test"})
    tab.until("document.getElementById('state').textContent === 'HALTED'")


def test_lost_dashboard_is_said(page):
    tab, _, _, server = page
    server.stop()
    tab.until("!document.getElementById('lost').hidden")
    assert "No connection to the dashboard since" in text(tab, "lost") and text(tab, "state") == "RUNNING"


def test_status_is_a_status(bot):
    assert msgspec.convert(client(bot[0]).get("/status.json").json["status"], Status).holdings[1].stop is None
