"""Passwords of a study's database reach neither a report nor a message."""

import pytest

from weft.compare.run.study_location import StudyLocation, parse_study_url, without_password

PLAIN = [
    "secret",
    "se/cret",
    "se:cret",
    "s@e/c:ret",
    "se%2Fcret",
    "se?c#ret",
    "/secret",
    "se/cret/",
]


@pytest.mark.parametrize("password", PLAIN)
@pytest.mark.parametrize("form", ["{}", "--study={}", "--study {} --out x"])
def test_a_password_is_masked_in_a_command(password, form):
    url = f"postgresql+psycopg://me:{password}@host:5432/database?sslmode=require#name"
    shown = without_password(form.format(url))
    assert shown == form.format(
        "postgresql+psycopg://me:***@host:5432/database?sslmode=require#name"
    )


def test_a_password_behind_the_question_mark_is_masked():
    shown = without_password("postgresql://host/db?user=me&password=secret&sslpassword=s/2#n")
    assert shown == "postgresql://host/db?user=me&password=***&sslpassword=***#n"


@pytest.mark.parametrize(
    "text", ["--json a@b:c", "http://host/path", "postgresql://me@host/db", "a:b@c"]
)
def test_what_has_no_password_stays(text):
    assert without_password(text) == text


def test_the_location_of_a_study_hides_it(tmp_path):
    pytest.importorskip("psycopg")
    url, name = parse_study_url("postgresql://me:se/c:ret@host/db?password=x2#mine")
    shown = str(StudyLocation(tmp_path, url, name))
    assert shown.endswith("#mine") and "me:***@host/db" in shown
    assert "ret" not in shown and "x2" not in shown
