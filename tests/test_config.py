"""Settings: which hand wins, and what a wrong value says."""
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from delta_go.config import VARIABLES, Settings, fractions, load_settings, misspelt
from delta_go.domain import SYMBOLS, InputError


@pytest.fixture(autouse=True)
def empty_room(monkeypatch, tmp_path):
    for variable in VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)


def test_defaults_are_the_documented_ones():
    settings = load_settings()
    assert settings.starting_equity == 10_000 and settings.symbols == SYMBOLS
    assert (settings.taker_fee, settings.gst, settings.slippage_bps) == (0.0005, 0.18, 5)
    assert fractions(settings) == {"risk_per_trade": 0.002, "max_position": 1.0, "max_exposure": 2.0, "daily_loss_limit": 0.05, "max_drawdown": 0.1}


def test_code_beats_environment_beats_file_beats_default(monkeypatch, tmp_path):
    (tmp_path / ".env").write_text("DELTA_LEVERAGE=4\nDELTA_SEED=9\nDELTA_API_KEY=not-ours\n")
    assert load_settings().leverage == 4
    monkeypatch.setenv("DELTA_LEVERAGE", "5")
    assert load_settings().leverage == 5
    assert load_settings(leverage=6).leverage == 6
    assert load_settings().seed == 9


def test_an_empty_variable_counts_as_unset(monkeypatch):
    monkeypatch.setenv("DELTA_LEVERAGE", "")
    assert load_settings().leverage == 3


WRONG = {
    "DELTA_STARTING_EQUITY": "0", "DELTA_TAKER_FEE": "-1", "DELTA_GST": "18", "DELTA_SLIPPAGE_BPS": "11", "RISK_PER_TRADE_PCT": "1%",
    "DELTA_MAX_POSITION_PCT": "nan", "DELTA_MAX_EXPOSURE_PCT": "inf", "DELTA_LEVERAGE": "0.5", "DAILY_LOSS_LIMIT_PCT": "101",
    "MAX_DRAWDOWN_PCT": "0", "DELTA_SYMBOLS": "btc", "DELTA_SEED": "1.5", "DELTA_JOBS": "0",
}


@pytest.mark.parametrize("variable", WRONG)
def test_a_wrong_value_is_one_line_that_names_its_variable(monkeypatch, variable):
    monkeypatch.setenv(variable, WRONG[variable])
    with pytest.raises(InputError) as error:
        load_settings()
    line = str(error.value)
    assert line.startswith(f"{variable}: expected ") and f"got '{WRONG[variable]}'" in line and line.endswith("in the environment") and "\n" not in line


def test_all_faults_come_at_once(monkeypatch):
    for variable, value in WRONG.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(InputError) as error:
        load_settings()
    assert {line.split(":")[0] for line in str(error.value).splitlines()} == set(WRONG)


@pytest.mark.parametrize("text", ["BTCUSD,BTCUSD", ",", "BTCUSD,", "BTC USD", "BTCUSD;ETHUSD", "../BTCUSD"])
def test_symbols_are_names(monkeypatch, text):
    monkeypatch.setenv("DELTA_SYMBOLS", text)
    with pytest.raises(InputError, match="^DELTA_SYMBOLS: expected"):
        load_settings()


def test_the_message_says_where_the_value_stood(monkeypatch, tmp_path):
    (tmp_path / "my.env").write_text("DELTA_LEVERAGE=500\n")
    with pytest.raises(InputError, match=r"correct it in my\.env$"):
        load_settings("my.env")
    with pytest.raises(InputError, match="correct it in the argument leverage$"):
        load_settings(leverage=500)


@pytest.mark.parametrize("name", ["DELTA_SYMBOL", "RISK_PER_TRADE_PCNT", "DAILY_LOSS_LIMIT", "delta_levrage"])
def test_a_misspelt_name_is_refused_with_the_right_one(monkeypatch, tmp_path, name):
    (tmp_path / ".env").write_text(f"{name}=1\n")
    with pytest.raises(InputError, match="did you mean"):
        load_settings()
    (tmp_path / ".env").unlink()
    monkeypatch.setenv(name, "1")
    with pytest.raises(InputError, match="did you mean"):
        load_settings()


def test_names_of_others_pass():
    assert misspelt(set(os.environ) | {"DELTA_API_KEY", "DELTA_API_SECRET", "PORT", "K_SERVICE"}) == []


def test_a_file_that_was_asked_for_must_be_there_and_be_text(tmp_path):
    with pytest.raises(InputError, match="found none"):
        load_settings(tmp_path / "none.env")
    (tmp_path / "bad.env").write_bytes(b"DELTA_SEED=\xff\xfe\n")
    with pytest.raises(InputError, match="UTF-8"):
        load_settings(tmp_path / "bad.env")


def test_an_unknown_argument_is_refused():
    with pytest.raises(InputError, match="^risk: no such setting"):
        load_settings(risk=1)


def test_settings_are_frozen():
    with pytest.raises(ValueError):
        load_settings().leverage = 100.0


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30), st.sampled_from(sorted(set(VARIABLES) - {"models"})))
def test_any_text_gives_settings_or_an_input_error(text, name):
    try:
        assert isinstance(load_settings(**{name: text}), Settings)
    except InputError as error:
        assert str(error).startswith(f"{VARIABLES[name]}: expected")


def test_the_domain_does_not_pay_for_the_settings():
    code = "import sys, delta_go.domain; sys.exit('pydantic' in sys.modules or 'dotenv' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
