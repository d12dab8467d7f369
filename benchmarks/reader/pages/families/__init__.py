"""The kinds of pages. ``HELD_OUT`` ones are only ever reported: nothing is trained or tuned on them."""

from benchmarks.reader.pages.families import boards, prose, records
from benchmarks.reader.pages.lines import Family

SEEN: dict[str, Family] = {
    "form": records.FORM,
    "receipt": records.RECEIPT,
    "table": records.TABLE,
    "inventory": records.INVENTORY,
    "orders": records.ORDERS,
    "schedule": boards.SCHEDULE,
    "plan": boards.PLAN,
    "story": prose.STORY,
    "needle": prose.NEEDLE,
}
HELD_OUT: dict[str, Family] = {
    "timetable": boards.TIMETABLE,
    "weather": boards.WEATHER,
    "letter": prose.LETTER,
}
FAMILIES = SEEN | HELD_OUT
