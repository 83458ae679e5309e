"""Reading one exact value from a short text."""

from decimal import ROUND_HALF_UP, Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward.value import asked_units, question_words, read_list, read_quantity, round_half_up, strip_lead, strip_markup


def read(text, question="How many apples?"):
    quantity = read_quantity(strip_markup(text), question_words(question), asked_units(question))
    return quantity and quantity[0]


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**9), max_value=10**9, places=4))
def test_a_decimal_reads_back_exactly(number):
    """`decimal` writes it, plainly and in exponent form; both forms read as the same exact number."""
    assert read(f"{number:f}") == Fraction(number)
    assert read(f"{number:e}") == Fraction(number)


@given(st.integers(-(10**30), 10**30))
def test_grouped_digits_read_as_the_integer(number):
    """Python's own digit grouping is the oracle; integers far above 2**53 stay exact."""
    assert read(f"{number:,}") == read(str(number)) == number
    assert read(f"{number:,}".replace(",", "\u202f")) == number


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-1000, max_value=1000, places=5), st.integers(0, 4))
def test_rounding_is_decimals_half_up(number, precision):
    expected = number.quantize(Decimal(1).scaleb(-precision), ROUND_HALF_UP)
    assert round_half_up(Fraction(number), precision) == Fraction(expected)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7/2", "7/2"),
        ("3 1/2", "7/2"),
        (r"-\frac{7}{2}", "-7/2"),
        (r"3\frac{1}{2}", "7/2"),
        (r"\frac72", "7/2"),
        (".5", "1/2"),
        ("5.", "5"),
        ("−12", "-12"),
        ("４２", "42"),
        ("4\u200b2", "42"),
        (r"4.2 \times 10^{1}", "42"),
        ("4.2×10⁻¹", "0.42"),
        ("1'234", "1234"),
        (r"The answer is $\boxed{42}$.", "42"),
        ("**Answer:** 42 apples", "42"),
        ("x = -42", "-42"),
        ("```\n42\n```", "42"),
    ],
)
def test_ways_to_write_one_number(text, value):
    assert read(text) == Fraction(value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-",
        "$",
        "1_0",
        "0x2A",
        "nan",
        "inf",
        "1e99999",
        "1e3e3",
        "½",
        "4²",
        "٤٢",
        "④②",
        "1,00",
        ",5",
        "1.2.3",
        "12,34",
        "7/0",
        "7/2/1",
        "3 4/3",
        r"\boxed{4}2",
        "**4**2",
        "1**234**",
        "42!",
        "42?",
        "42+",
        "~42",
        "> 42",
        "42-43",
        "10-7",
        "42 or 43",
        "about 42",
        "at least 42",
        "not 42",
        "42 thousand",
        "42 pears",
        "42%",
        "$42",
        "42nd",
        "42k",
        "- 42",
        "2*21",
        "9**9**9**9",
        "print(42)",
        "[42]",
        r"\sqrt{42}",
        "42 <answer>",
        "\u202e42",
        "42,",
        "1, 234",
        "two 42",
    ],
)
def test_what_is_not_one_number(text):
    assert read(text) is None


@pytest.mark.parametrize(
    ("question", "right", "wrong"),
    [
        ("How many kilometres did they drive?", ["60 km", "60km", "60 kilometers"], ["60 m", "60 miles", "60 km/h"]),
        ("She has $20. How much is left?", ["$60", "60 dollars", "USD 60", "60$"], ["€60", "60 cents", "$60/hour"]),
        ("She has $20. How many pens can she buy?", ["60 pens", "60"], ["$60", "60 dollars"]),
        ("What percentage passed?", ["60%", r"60\%", "60 percent"], ["60 degrees", "$60"]),
        ("20% are red. What is the cost of the rest?", ["60"], ["60%"]),
        ("What is the measure of angle A?", ["60°", r"60^\circ", "60 degrees"], ["60 cm", "60%"]),
        ("What is the area in square cm?", ["60 cm²", "60 cm^2", "60 square centimeters"], ["60 m²", "60 cm³"]),
    ],
)
def test_only_the_unit_asked_for(question, right, wrong):
    assert [read(text, question) for text in right] == [60] * len(right)
    assert [read(text, question) for text in wrong] == [None] * len(wrong)


def test_a_sentence_may_use_the_words_of_the_question():
    question = "Tom earns money by selling apples. What is the measure of angle H?"
    for text in ("Tom earned 42.", "the angle H measures 42", "So, Tom sells 42 apples"):
        assert read(text, question) == 42
    for text in ("Ann earned 42", "42 H", "42H", "Tom earned under 42", "Tom sells 42 pears", "angle H is not 42"):
        assert read(text, question) is None


def test_a_bound_is_no_value_even_in_the_words_of_the_question():
    question = "She ran at most 50 km, about 20 minutes under her record. How many apples did she bring to school?"
    for text in ("about 42", "at most 42", "under 42 apples", "She ran to 42", "42apples"):
        assert read(text, question) is None
    assert read("42 apples about school", question) == 42


def test_lists_are_flat_ordered_and_ungrouped():
    assert (
        read_list("[2014, 2016]") == read_list("(2014,2016)") == read_list("The answer is 2014, 2016.") == (2014, 2016)
    )
    assert read_list("[0.5, -1/2]") == (Fraction(1, 2), Fraction(-1, 2))
    for text in ("", "[]", "[[1, 2]]", "{1, 2}", "[1, 2] or [3, 4]", "[1; 2]", "[1,]", "1 and 2"):
        assert read_list(text) is None


def test_lead_is_removed_once_and_nothing_else():
    assert strip_lead("The final answer is: (C)") == "C"
    assert strip_lead("Option C") == "C"
    assert strip_lead("not the answer") == "not the answer"
