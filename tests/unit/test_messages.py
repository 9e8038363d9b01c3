"""What the terminal shows while a bar is open."""

import io
import logging
import re

from tqdm import tqdm

from pipeline.run import _AboveBars


def test_a_message_stands_on_a_line_of_its_own_above_the_bar():
    stream = io.StringIO()
    logger = logging.Logger("unregistered")
    logger.addHandler(_AboveBars(stream))
    with tqdm(total=3, file=stream, mininterval=0) as bar:
        bar.update()
        logger.warning("step 1: said")
        bar.update()
    pieces = re.split(r"[\r\n]", stream.getvalue())
    assert "step 1: said" in pieces
    assert any("2/3" in piece for piece in pieces[pieces.index("step 1: said") :])
