"""Words for what is wrong with a file."""

import json

import pytest

from megaflow.errors import reason


@pytest.mark.parametrize(
    "wrong, said",
    [
        (lambda: open("/no/such"), "such: No such file or directory"),
        (lambda: {}["steps"], "it has no steps"),
        (lambda: [].keys(), "its content is of another form"),
        (lambda: json.loads("["), "Expecting value: line 1 column 2 (char 1)"),
    ],
)
def test_a_reason_is_in_no_language_of_programs(wrong, said):
    with pytest.raises(Exception) as error:
        wrong()
    assert reason(error.value) == said
