"""What does one hour, or one TiB, cost, and who says so?

    prices = load_prices()                              # prices.json, or a file of yours of the same format
    prices = given(prices, tpu_v5e=1.5, cpu=0.1)        # your own, of an hour of a chip or of a machine

A price in prices.json has its currency, its region, the page and the day on which it was read there; or it is unread,
and these are null: then amounts are printed in place of money. No price is filled in that nobody has read.

Needs: prices.json
"""

from __future__ import annotations

import datetime
import json
import math
from pathlib import Path

PRICES = Path(__file__).parent / "prices.json"
UNITS = {"TiB": 2**40, "GiB": 2**30, "hour": 1}  # what a unit in prices.json begins with: its bytes or hours
# The prices, and what their amounts are called in a line of the plan.
WAREHOUSE = dict(query="query", storage_read="read", export="export")
WAREHOUSE |= dict(bigquery_storage="tables", cloud_storage="files", worker="worker")
MACHINES = dict(cpu="CPU", gpu_l4="GPU L4", gpu_h100="GPU H100")  # what training runs on (training_costs.py)
MACHINES |= {f"tpu_{name}": f"TPU {name}" for name in ("v4", "v5e", "v5p", "v6e")}
KINDS = WAREHOUSE | MACHINES
FIELDS = {"unit", "price", "currency", "region", "source", "read"}


def load_prices(path: str | Path = PRICES) -> dict[str, dict]:
    """The prices, name in `KINDS` -> `FIELDS`; None while unread, but for unit and source.

    Raises ValueError, which says which price, what was found and what was expected; also for two currencies.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from error
    if not isinstance(content, dict) or set(content) != set(KINDS):
        raise ValueError(f"{path}: prices {sorted(content)}, expected {sorted(KINDS)}")
    for kind, entry in content.items():
        if wrong := _wrong(entry):
            raise ValueError(f"{path}, price {kind!r}: {wrong}")
    if len(currencies := {entry["currency"] for entry in content.values()} - {None}) > 1:
        raise ValueError(f"{path}: prices in {' and '.join(sorted(currencies))}, which cannot be added; expected one")
    return content


def _wrong(entry: dict) -> str:
    """What is wrong with an entry of prices.json, "" for nothing."""
    if not isinstance(entry, dict) or set(entry) != FIELDS:
        return f"{entry}; expected the fields {', '.join(sorted(FIELDS))}"
    if str(entry["unit"]).partition(" ")[0] not in UNITS:
        return f"unit {entry['unit']!r}, expected one that begins with {', '.join(UNITS)}"
    if not str(entry["source"]).startswith("https://"):
        return f"source {entry['source']!r}, expected the https:// address of the official page"
    price, currency, region, read = (entry[name] for name in ("price", "currency", "region", "read"))
    if (price, currency, region, read) == (None,) * 4:
        return ""
    if type(price) not in (int, float) or not 0 <= price < math.inf:
        return f"price {price!r}, expected a number from 0 up, or null with currency, region and read null too"
    if not isinstance(currency, str) or not currency:
        return f"currency {currency!r}, expected a name such as USD"
    if not isinstance(region, str) or not region:
        return f"region {region!r}, expected where the price holds, such as us-central1"
    try:
        future = datetime.date.fromisoformat(read) > datetime.date.today()
    except (TypeError, ValueError):
        future = True
    return f"read {read!r}, expected the day on which the price was read, YYYY-MM-DD, not after today" if future else ""


def given(prices: dict[str, dict], **own: float | None) -> dict[str, dict]:
    """The prices, with your own: `given(load_prices(), tpu_v5e=1.5)`; None leaves a price as it is.

    A price is that of its unit, in the currency of the prices that were read. Raises ValueError for a name that
    prices.json does not have, or a price that is no number from 0 up.
    """
    for kind, price in own.items():
        if kind not in prices or not (price is None or 0 <= price < math.inf):
            raise ValueError(f"price {kind}={price}; expected a number from 0 up for one of {', '.join(prices)}")
    own = {kind: price for kind, price in own.items() if price is not None}
    return prices | {kind: prices[kind] | {"price": p, "region": None, "read": None} for kind, p in own.items()}


def bill(amounts: dict[str, float | None], prices: dict[str, dict]) -> str:
    """Such as "3.20 USD + unread: 4.77 TiB query"; amounts are bytes, hours for "worker", None where not known."""
    money, unread = 0.0, []
    for kind, amount in amounts.items():
        price, unit = prices[kind]["price"], prices[kind]["unit"].split()[0]
        if amount is None or (amount and price is None):
            unread.append(f"{figure(amount and amount / UNITS[unit])} {unit.replace('hour', 'h')} {KINDS[kind]}")
        else:
            money += amount / UNITS[unit] * (price or 0)
    currency = next((price["currency"] for price in prices.values() if price["currency"]), "in your currency")
    known = [f"{money:,.2f} {currency}"] if money or not unread else []
    return " + ".join(known + ["unread: " + " + ".join(unread)] * bool(unread))


def price_list(prices: dict[str, dict]) -> list[str]:
    """A line for each price: what it is of, what it is, and where it was or is to be read."""
    lines = ["", f"{'price':9}{'of one':39}{'is':24}source"]
    for kind, price in prices.items():
        found = f"{price['price']} {price['currency'] or ''} ({price['read'] or 'as given'})"
        found = "unread" if price["price"] is None else found.replace("  ", " ")
        place = f"{price['source'].removeprefix('https://')} {price['region'] or ''}".rstrip()
        lines.append(f"{KINDS[kind]:9}{price['unit']:39}{found:24}{place}")
    flags = " ".join(f"--price-{kind.replace('_', '-')} X" for kind in list(prices)[:3])
    lines.append(
        "Prices differ by region. Read them there; then write price, currency, region and day into prices.json,"
    )
    return [*lines, f"or pass {flags} ... to python -m recsys_common.costs."]


def figure(value: float | None) -> str:
    """A number at a glance: 1,863 or 17.8 or 0.07 or 0.0003; "?" for None, "-" for 0."""
    if not value:
        return "?" if value is None else "-"
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}" if value >= 0.01 else f"{value:.1g}"
