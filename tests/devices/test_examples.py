import csv
from collections import Counter
from pathlib import Path

import pytest

INTENTS = Path(__file__).parents[2] / "docs" / "examples" / "intents"
PER_LABEL = {"workstation": 20, "user": 12, "user_test": 8}


def read(name):
    with (INTENTS / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        assert reader.fieldnames == ["text", "label"]
        rows = [(row["text"], row["label"]) for row in reader]
    assert all(None not in row for row in rows)
    return rows


def words(name, label=None):
    return {word for text, found in read(name) if label in (None, found) for word in text.lower().split()}


@pytest.mark.parametrize("name", PER_LABEL)
def test_counts(name):
    counts = Counter(label for _, label in read(name))
    assert len(counts) == 8
    assert set(counts.values()) == {PER_LABEL[name]}


def test_the_label_sets_are_the_same():
    assert len({frozenset(label for _, label in read(name)) for name in PER_LABEL}) == 1


def test_no_phrase_appears_twice_in_any_file():
    phrases = [
        "".join(character for character in text.lower() if character.isalnum())
        for name in PER_LABEL
        for text, _ in read(name)
    ]
    assert [phrase for phrase, count in Counter(phrases).items() if count > 1] == []


@pytest.mark.parametrize("name", PER_LABEL)
def test_phrases_are_clean_text(name):
    for text, _ in read(name):
        assert text == " ".join(text.split())
        assert text.isascii()
        assert 1 < len(text.split()) <= 14


@pytest.mark.parametrize("name", PER_LABEL)
def test_every_prefix_is_balanced(name):
    labels = [label for _, label in read(name)]
    assert all(len(set(labels[start : start + 8])) == 8 for start in range(0, len(labels), 8))


@pytest.mark.parametrize("label", sorted({label for _, label in read("user")}))
def test_the_test_rows_share_the_users_words(label):
    private = words("user", label) - words("workstation") - {"-"}
    speaking = [set(text.lower().split()) for text, found in read("user_test") if found == label]
    assert all(private & phrase for phrase in speaking)
