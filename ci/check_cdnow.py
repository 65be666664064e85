"""Compares a run's revenue per day with a computation of its own from the raw purchase file: standard library only.

Usage: check_cdnow.py cdnow_master.txt.gz revenue_per_day.csv
"""

import collections
import csv
import decimal
import gzip
import sys


def expected(path):
    """Rows, zero amounts and revenue of each day, straight from the file."""
    days = collections.defaultdict(lambda: [0, 0, decimal.Decimal("0.00")])
    with gzip.open(path, "rt", newline="\r\n") as lines:
        next(lines)
        for line in lines:
            _, date, _, dollars = line.split()
            amount = decimal.Decimal(dollars)
            day = days[f"{date[:4]}-{date[4:6]}-{date[6:]}"]
            day[0] += 1
            day[1] += amount == 0
            day[2] += amount
    return days


def main(raw, result):
    days = expected(raw)
    wrong, rows, zero, revenue = [], 0, 0, decimal.Decimal("0.00")
    found = list(csv.DictReader(open(result, encoding="utf-8")))
    for line in found:
        want = days[line["fecha"]]
        have = [int(line["rows"]), int(line["rejected"]), decimal.Decimal(line["revenue"])]
        if have != want or int(line["published"]) != want[0] - want[1]:
            wrong.append(f"{line['fecha']}: found {have}, expected {want}")
        rows, zero, revenue = rows + have[0], zero + have[1], revenue + have[2]
    for line in wrong:
        print(line, file=sys.stderr)
    if not found:
        print(f"{result}: found no days, expected at least one", file=sys.stderr)
    whole = f" of {len(days)}" if len(found) < len(days) else ""
    print(f"{len(found)}{whole} days, {rows:,} purchases, {zero} rejected as zero, revenue {revenue:,}: "
          + (f"{len(wrong)} days differ" if wrong else "equal to the cent on every day"))
    return 1 if wrong or not found else 0


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
