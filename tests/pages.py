"""The data inside a page that a command wrote."""

import json
import re


def data_of(page):
    """What the script of a page reads."""
    source = page.read_text(encoding="utf-8")
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', source, re.DOTALL)
    return json.loads(data)
