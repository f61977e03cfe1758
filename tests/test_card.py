from pathlib import Path

import pytest
from model_folders import write

from edgediff import load_model


@pytest.mark.parametrize(
    ("readme", "license_file", "name"),
    [
        ("---\nlicense: mit\n---\n# Card\n", None, "mit"),
        ('---\ntags: [art]\nlicense: "cc-by-4.0"\nlanguage: en\n---\n', None, "cc-by-4.0"),
        ("---\r\nlicense: openrail\r\n---\r\n", None, "openrail"),
        ("---\nlicense: mit\n---\n", "Apache License\n", "mit"),
        ("# no front matter\n", "   Apache License\n   Version 2.0\n", "Apache-2.0"),
        (None, "MIT License\n\nCopyright\n", "MIT"),
        (None, "CreativeML Open RAIL-M\n", "CreativeML-OpenRAIL-M"),
        (None, "All rights are somebody's.\n", "unknown"),
        (None, None, "unknown"),
        ("license: mit\n", None, "unknown"),
        ("---\nlicense: mit\n", None, "unknown"),
        ("---\nlicense_name: mine\n---\n", None, "unknown"),
        ("---\nlicense:\n- mit\n- gpl-3.0\n---\n", None, "unknown"),
        ("---\ntags: [art]\n---\n\nlicense: mit\n---\n", None, "unknown"),
    ],
)
def test_the_licence_of_the_card(folder: Path, readme: str | None, license_file: str | None, name: str) -> None:
    if readme is not None:
        write(folder / "README.md", readme)
    if license_file is not None:
        write(folder / "LICENSE", license_file)
    card = load_model(folder).card
    assert (card.license, card.license_text) == (name, license_file)
    assert card.text == ("" if readme is None else readme.replace("\r\n", "\n"))


@pytest.mark.parametrize(
    ("front", "steps", "guidance"),
    [
        ("inference:\n  parameters:\n    num_inference_steps: 6\n    guidance_scale: 3.5\n", 6, 3.5),
        ("inference: {parameters: {guidance_scale: 3}}\n", None, 3.0),
        ("inference: {parameters: {num_inference_steps: 0, guidance_scale: .nan}}\n", None, None),
        ("inference: {parameters: {num_inference_steps: true, guidance_scale: high}}\n", None, None),
        ("inference: false\n", None, None),
        ("inference: {parameters: [3]}\n", None, None),
        ("license: mit\ninference: {parameters: {\n", None, None),
    ],
)
def test_what_the_card_says_the_model_is_sampled_with(
    folder: Path, front: str, steps: int | None, guidance: float | None
) -> None:
    without = load_model(folder)
    write(folder / "README.md", f"---\n{front}---\n# Card\n")
    model = load_model(folder)
    assert (model.card.steps, model.card.guidance_scale) == (steps, guidance)
    assert model.usual_steps == (without.usual_steps if steps is None else steps)
    assert model.sha256 == without.sha256
