"""Words: long names of runs in sentences."""

from app import words

FULL = "llama_full_lr3e-4_wd0.1_seed1337_retry2"
BLOCK = "llama_block_lr3e-4_wd0.1_seed1337_retry2"


def test_long_names_are_told_apart_by_what_differs():
    short = words.shortened([FULL, BLOCK, "small"])
    assert short == {FULL: "llama_full_l…d1337_retry2", BLOCK: "llama_block_…d1337_retry2"}
    short = words.shortened([FULL, BLOCK])
    assert short == {FULL: "…full…", BLOCK: "…block…"}
    assert words.replaced(f"1 in {FULL}, 2 in {BLOCK}", short) == "1 in …full…, 2 in …block…"


def test_a_long_name_alone_keeps_its_ends():
    assert words.shortened([FULL]) == {FULL: "llama_full_l…d1337_retry2"}
    assert words.shortened(["full", "block"]) == {}


def test_names_that_would_look_alike_stay_whole():
    assert words.shortened(["x" * 20 + sign + "y" * 20 for sign in "ab"]) == {}
