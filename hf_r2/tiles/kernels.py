"""What one program does for a tile of a block, and for the partial results of a group.

A tile is `(ROWS, COLUMNS)`: some groups of a block, and some or all of their elements. What a program finds out about a
row of its tile goes to the row's *slot*; the slots of a group lie side by side, and a second kernel folds them. So
nothing depends on the order in which programs run.
"""

import triton
import triton.language as tl

FIELDS = tl.constexpr(6)
"""Of a block: elements of a group, groups, first program, tiles of a group, first group, first slot."""

MAGNITUDE = tl.constexpr(0x7FFFFFFF)
"""Bits of a float32 without its sign; as whole numbers they are in the order of the magnitudes, NaN above infinity."""


@triton.jit
def _tile(layout, owners, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    program = tl.program_id(0)
    block = tl.load(owners + program)
    fields = layout + block * FIELDS
    n, groups = tl.load(fields), tl.load(fields + 1)
    tiles = tl.load(fields + 3)
    number = program - tl.load(fields + 2)
    row = number // tiles * ROWS + tl.arange(0, ROWS)
    column = number % tiles * COLUMNS + tl.arange(0, COLUMNS)
    there = row < groups
    inside = there[:, None] & (column < n)[None, :]
    slot = tl.load(fields + 5) + row * tiles + number % tiles
    return block, tl.load(fields + 4) + row, slot, row[:, None] * n + column[None, :], inside, there


@triton.jit
def _load(addresses, block, offset, inside, DTYPE: tl.constexpr):
    pointer = tl.load(addresses + block).to(tl.pointer_type(DTYPE))
    return tl.load(pointer + offset, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(addresses, block, offset, inside, values, DTYPE: tl.constexpr):
    pointer = tl.load(addresses + block).to(tl.pointer_type(DTYPE))
    tl.store(pointer + offset, values.to(DTYPE), mask=inside)


@triton.jit
def _add(addresses, block, offset, inside, values, DTYPE: tl.constexpr):
    _store(addresses, block, offset, inside, _load(addresses, block, offset, inside, DTYPE) + values, DTYPE)


@triton.jit
def _magnitude_bits(values):
    return values.to(tl.int32, bitcast=True) & MAGNITUDE


@triton.jit
def _sign(values):
    return tl.where(values > 0, 1.0, tl.where(values < 0, -1.0, 0.0))


# --- partial results of tiles -----------------------------------------------------------------------------------------


@triton.jit
def largest(layout, owners, addresses, tops, counts, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Largest magnitude, as its bits, and how many elements have it."""
    block, _, slot, offset, inside, there = _tile(layout, owners, ROWS, COLUMNS)
    bits = _magnitude_bits(_load(addresses, block, offset, inside, DTYPE))
    top = tl.max(bits, axis=1)
    tl.store(tops + slot, top, mask=there)
    tl.store(counts + slot, tl.sum(((bits == top[:, None]) & inside).to(tl.int32), axis=1), mask=there)


@triton.jit
def ends(layout, owners, addresses, partials, slots, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Largest element, smallest with its sign turned, and sum of squares, which no float32 leaves in float64."""
    block, _, slot, offset, inside, there = _tile(layout, owners, ROWS, COLUMNS)
    values = _load(addresses, block, offset, inside, DTYPE)
    nothing = float("-inf")
    high = tl.max(tl.where(inside, values, nothing), axis=1)
    low = tl.max(tl.where(inside, -values, nothing), axis=1)
    wide = values.to(tl.float64)
    tl.store(partials + slot, high.to(tl.float64), mask=there)
    tl.store(partials + slots + slot, low.to(tl.float64), mask=there)
    tl.store(partials + 2 * slots + slot, tl.sum(wide * wide, axis=1), mask=there)


@triton.jit
def excess(
    layout,
    owners,
    addresses,
    partials,
    slots,
    level,
    tops,
    settled,
    SEARCHING: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sum of what stands above the group's level, and how many elements do.

    In a search for the level, those at it count, too; tiles without any are not read again, nor those of groups that
    are settled.
    """
    block, group, slot, offset, inside, there = _tile(layout, owners, ROWS, COLUMNS)
    limit = tl.load(level + group, mask=there, other=0.0)
    total, count = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    wanted = 1
    if SEARCHING:
        top = tl.load(tops + slot, mask=there, other=0).to(tl.float32, bitcast=True)
        open_rows = there & (tl.load(settled + group, mask=there, other=1) == 0)
        wanted = tl.max((open_rows & ~(top < limit)).to(tl.int32), axis=0)
    if wanted > 0:
        values = tl.abs(_load(addresses, block, offset, inside, DTYPE))
        # False for NaN, which then shows in the sum
        below = values < limit[:, None] if SEARCHING else values <= limit[:, None]
        total = tl.sum(tl.where(below | ~inside, 0.0, values - limit[:, None]), axis=1)
        count = tl.sum((~below & inside).to(tl.float32), axis=1)
    tl.store(partials + slot, total, mask=there)
    tl.store(partials + slots + slot, count, mask=there)


@triton.jit
def soft_sums(
    layout,
    owners,
    addresses,
    partials,
    slots,
    rates,
    bounds,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sum `e`, `e·d` and `e·d²`, `e = exp(−rate · d)`, over the distances d from the high and the low end."""
    block, group, slot, offset, inside, there = _tile(layout, owners, ROWS, COLUMNS)
    values = _load(addresses, block, offset, inside, DTYPE)
    rate = tl.load(rates + group, mask=there, other=0.0)[:, None]
    for side in tl.static_range(2):
        end = tl.load(bounds + 2 * group + side, mask=there, other=0.0)[:, None]
        distance = tl.where(inside, end - values if side == 0 else values - end, 0.0)
        e = tl.where(inside, tl.exp(-rate * distance), 0.0)
        target = partials + 3 * side * slots + slot
        tl.store(target, tl.sum(e, axis=1), mask=there)
        tl.store(target + slots, tl.sum(e * distance, axis=1), mask=there)
        tl.store(target + 2 * slots, tl.sum(e * distance * distance, axis=1), mask=there)


@triton.jit
def moments(
    layout,
    owners,
    addresses,
    partials,
    slots,
    units,
    centres,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sum the powers 1 to 4 of `unit · (W − centre)`."""
    block, group, slot, offset, inside, there = _tile(layout, owners, ROWS, COLUMNS)
    unit = tl.load(units + group, mask=there, other=0.0)[:, None]
    centre = tl.load(centres + group, mask=there, other=0.0)[:, None]
    x = tl.where(inside, (_load(addresses, block, offset, inside, DTYPE) - centre) * unit, 0.0)
    power = x
    for number in tl.static_range(4):
        tl.store(partials + number * slots + slot, tl.sum(power, axis=1), mask=there)
        power *= x


@triton.jit(do_not_specialize=["shift"])
def count_from(
    layout,
    owners,
    addresses,
    partials,
    slots,
    prefix,
    shift,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """How many elements' magnitudes, as bits, are not below `prefix + (digit << shift)`, for the digits 1 to 15."""
    block, group, slot, offset, inside, there = _tile(layout, owners, ROWS, COLUMNS)
    bits = _magnitude_bits(_load(addresses, block, offset, inside, DTYPE))
    start = tl.load(prefix + group, mask=there, other=0)[:, None]
    for digit in tl.static_range(1, 16):
        count = tl.sum((inside & (bits - start >= (digit << shift))).to(tl.float32), axis=1)
        tl.store(partials + (digit - 1) * slots + slot, count, mask=there)


@triton.jit
def sampled_level(
    layout,
    owners,
    addresses,
    amounts,
    level,
    STEPS: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Level above which an amount stands out; of a group of several tiles, by a sample of one tile's size.

    By Newton's method from 0. A level that is known already, not above the solution, is replaced by a higher one.
    """
    block, group, _, _, _, there = _tile(layout, owners, ROWS, COLUMNS)
    fields = layout + block * FIELDS
    n, tiles = tl.load(fields), tl.load(fields + 3)
    number = tl.program_id(0) - tl.load(fields + 2)
    if number % tiles == 0:
        row = number // tiles * ROWS + tl.arange(0, ROWS)
        column = tl.arange(0, COLUMNS) * tl.maximum(n // COLUMNS, 1)
        sampled = there[:, None] & (column < n)[None, :]
        values = tl.abs(_load(addresses, block, row[:, None] * n + column[None, :], sampled, DTYPE))
        share = tl.minimum(n, COLUMNS).to(tl.float32) / n.to(tl.float32)
        amount = tl.load(amounts + group, mask=there, other=0.0).to(tl.float32) * share
        found = tl.zeros([ROWS], tl.float32)
        step = 0
        while step < STEPS:
            above = sampled & ~(values < found[:, None])
            total = tl.sum(tl.where(above, values - found[:, None], 0.0), axis=1)
            count = tl.sum(above.to(tl.float32), axis=1)
            stepped = found + (total - amount) / tl.maximum(count, 1.0)
            stepped = tl.where(stepped < found, found, stepped)
            step = tl.where(tl.max((stepped != found).to(tl.int32), axis=0) == 0, STEPS, step + 1)
            found = stepped
        known = tl.load(level + group, mask=there, other=0.0)
        tl.store(level + group, tl.where(found < known, known, found), mask=there)


# --- groups: what their slots hold ------------------------------------------------------------------------------------


@triton.jit
def fold(starts, partials, result, slots, groups, MAXIMA: tl.constexpr, WIDE: tl.constexpr):
    """Largest of each of the first columns of partial results, and sums of the others, in float64."""
    group, column = tl.program_id(0), tl.program_id(1)
    first, last = tl.load(starts + group), tl.load(starts + group + 1)
    lanes = tl.arange(0, WIDE)
    largest_one = tl.full([WIDE], float("-inf"), tl.float64)
    total = tl.zeros([WIDE], tl.float64)
    for start in range(first, last, WIDE):
        here = start + lanes < last
        found = tl.load(partials + column * slots + start + lanes, mask=here, other=0.0).to(tl.float64)
        largest_one = tl.maximum(largest_one, tl.where(here, found, float("-inf")))
        total += found
    value = tl.sum(total, axis=0)
    if column < MAXIMA:
        value = tl.max(largest_one, axis=0)
    tl.store(result + column * groups + group, value)


@triton.jit
def fold_largest(starts, tops, counts, result, result_counts, WIDE: tl.constexpr):
    """Largest magnitude, as its bits, and how many elements have it."""
    group = tl.program_id(0)
    first, last = tl.load(starts + group), tl.load(starts + group + 1)
    lanes = tl.arange(0, WIDE)
    best = tl.zeros([WIDE], tl.int32)
    for start in range(first, last, WIDE):
        here = start + lanes < last
        best = tl.maximum(best, tl.load(tops + start + lanes, mask=here, other=0))
    top = tl.max(best, axis=0)
    count = tl.zeros([WIDE], tl.int32)
    for start in range(first, last, WIDE):
        here = start + lanes < last
        has_it = here & (tl.load(tops + start + lanes, mask=here, other=-1) == top)
        count += tl.load(counts + start + lanes, mask=has_it, other=0)
    tl.store(result + group, top)
    tl.store(result_counts + group, tl.sum(count, axis=0).to(tl.float32))


@triton.jit
def lowest_level(starts, tops, amounts, result, STEPS: tl.constexpr, WIDE: tl.constexpr):
    """Level above which the tiles' largest magnitudes add up to an amount: not above that of all elements."""
    group = tl.program_id(0)
    first, last = tl.load(starts + group), tl.load(starts + group + 1)
    amount = tl.load(amounts + group)
    lanes = tl.arange(0, WIDE)
    level = amount * 0
    step = 0
    while step < STEPS:
        total, count = tl.zeros([WIDE], tl.float64), tl.zeros([WIDE], tl.float64)
        for start in range(first, last, WIDE):
            top = tl.load(tops + start + lanes, mask=start + lanes < last, other=0).to(tl.float32, bitcast=True)
            above = top.to(tl.float64) - level
            total += tl.where(above > 0, above, 0)
            count += (above > 0).to(tl.float64)
        number = tl.sum(count, axis=0)
        stepped = level + (tl.sum(total, axis=0) - amount) / tl.maximum(number, 1.0)
        stepped = tl.where((number > 0) & (stepped > level), stepped, level)
        step = tl.where(stepped == level, STEPS, step + 1)
        level = stepped
    tl.store(result + group, level.to(tl.float32))


@triton.jit
def newton_step(starts, partials, slots, amounts, lowest, level, settled, WIDE: tl.constexpr):
    """Move a group's level to where, from the sum and count above it, an amount would stand above.

    From a level above the solution the step leads below it, but not below the lowest that it can be, and from there
    never beyond.
    """
    group = tl.program_id(0)
    if tl.load(settled + group) == 0:
        first, last = tl.load(starts + group), tl.load(starts + group + 1)
        lanes = tl.arange(0, WIDE)
        total, count = tl.zeros([WIDE], tl.float64), tl.zeros([WIDE], tl.float64)
        for start in range(first, last, WIDE):
            here = start + lanes < last
            total += tl.load(partials + start + lanes, mask=here, other=0.0).to(tl.float64)
            count += tl.load(partials + slots + start + lanes, mask=here, other=0.0).to(tl.float64)
        number = tl.sum(count, axis=0)
        before, least = tl.load(level + group), tl.load(lowest + group).to(tl.float64)
        stepped = before.to(tl.float64) + (tl.sum(total, axis=0) - tl.load(amounts + group)) / tl.maximum(number, 1.0)
        # Not maximum, which would lose NaN
        stepped = tl.where((stepped < least) | (number == 0), least, stepped).to(tl.float32)
        tl.store(level + group, stepped)
        tl.store(settled + group, (stepped == before).to(tl.int32))


# --- changes of weights and gradients ---------------------------------------------------------------------------------


@triton.jit
def add_largest(
    layout,
    owners,
    addresses,
    targets,
    tops,
    wanted,
    shares,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Add a group's share × sign(W) where the magnitude is what is wanted; other tiles are not read."""
    block, group, slot, offset, inside, there = _tile(layout, owners, ROWS, COLUMNS)
    level = tl.load(wanted + group, mask=there, other=-1)
    has_it = tl.load(tops + slot, mask=there, other=-2) == level
    if tl.max(has_it.to(tl.int32), axis=0) > 0:
        values = _load(addresses, block, offset, inside, DTYPE)
        found = inside & (_magnitude_bits(values) == level[:, None])
        share = tl.load(shares + group, mask=there, other=0.0)
        _add(targets, block, offset, found, _sign(values) * share[:, None], DTYPE)


@triton.jit
def add_signs_outside(
    layout,
    owners,
    addresses,
    targets,
    counts,
    level,
    scales,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Add a group's scale × sign(W) to what stands above its level; tiles that count none are not read."""
    block, group, slot, offset, inside, there = _tile(layout, owners, ROWS, COLUMNS)
    if tl.max(tl.load(counts + slot, mask=there, other=0.0), axis=0) > 0:
        values = _load(addresses, block, offset, inside, DTYPE)
        outside = inside & (tl.abs(values) > tl.load(level + group, mask=there, other=0.0)[:, None])
        scale = tl.load(scales + group, mask=there, other=0.0)
        _add(targets, block, offset, outside, _sign(values) * scale[:, None], DTYPE)


@triton.jit
def add_signs_from(
    layout,
    owners,
    addresses,
    targets,
    level,
    scales,
    scales_at,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Add a group's scale × sign(W) to what stands above its level, and another to what stands at it."""
    block, group, _, offset, inside, there = _tile(layout, owners, ROWS, COLUMNS)
    values = _load(addresses, block, offset, inside, DTYPE)
    limit = tl.load(level + group, mask=there, other=0.0)[:, None]
    above = tl.load(scales + group, mask=there, other=0.0)[:, None]
    at = tl.load(scales_at + group, mask=there, other=0.0)[:, None]
    scale = tl.where(tl.abs(values) > limit, above, at)
    _add(targets, block, offset, inside & (tl.abs(values) >= limit), _sign(values) * scale, DTYPE)


@triton.jit
def add_soft_gradient(
    layout,
    owners,
    addresses,
    targets,
    rates,
    bounds,
    coefficients,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Add `e · (c0 − c1 · d)` of the high end, and take away that of the low end."""
    block, group, _, offset, inside, there = _tile(layout, owners, ROWS, COLUMNS)
    values = _load(addresses, block, offset, inside, DTYPE)
    rate = tl.load(rates + group, mask=there, other=0.0)[:, None]
    change = tl.zeros([ROWS, COLUMNS], tl.float32)
    for side in tl.static_range(2):
        end = tl.load(bounds + 2 * group + side, mask=there, other=0.0)[:, None]
        distance = end - values if side == 0 else values - end
        constant = tl.load(coefficients + 4 * group + 2 * side, mask=there, other=0.0)[:, None]
        slope = tl.load(coefficients + 4 * group + 2 * side + 1, mask=there, other=0.0)[:, None]
        term = tl.exp(-rate * distance) * (constant - slope * distance)
        change += term if side == 0 else -term
    _add(targets, block, offset, inside, change, DTYPE)


@triton.jit
def add_kurtosis_gradient(
    layout,
    owners,
    addresses,
    targets,
    terms,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Add `factor · (x · (x² − linear) − cube)` with `x = unit · (W − mean)`, from a group's five terms."""
    block, group, _, offset, inside, there = _tile(layout, owners, ROWS, COLUMNS)
    of_group = terms + 5 * group
    factor = tl.load(of_group, mask=there, other=0.0)[:, None]
    cube = tl.load(of_group + 1, mask=there, other=0.0)[:, None]
    linear = tl.load(of_group + 2, mask=there, other=0.0)[:, None]
    mean = tl.load(of_group + 3, mask=there, other=0.0)[:, None]
    unit = tl.load(of_group + 4, mask=there, other=0.0)[:, None]
    x = (_load(addresses, block, offset, inside, DTYPE) - mean) * unit
    _add(targets, block, offset, inside, factor * (x * (x * x - linear) - cube), DTYPE)


@triton.jit
def clamp(
    layout,
    owners,
    addresses,
    level,
    shares,
    tops,
    SHARED: tl.constexpr,
    SKIPPING: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Go a share of the way to the group's level, or all of it; tiles that nothing stands above it in are not read."""
    block, group, slot, offset, inside, there = _tile(layout, owners, ROWS, COLUMNS)
    bound = tl.load(level + group, mask=there, other=0.0)
    wanted = 1
    if SKIPPING:
        top = tl.load(tops + slot, mask=there, other=0).to(tl.float32, bitcast=True)
        wanted = tl.max((there & ~(top <= bound)).to(tl.int32), axis=0)
    if wanted > 0:
        values = _load(addresses, block, offset, inside, DTYPE)
        limited = tl.maximum(tl.minimum(values, bound[:, None]), -bound[:, None])
        changed = inside & (tl.abs(values) > bound[:, None])
        if SHARED:
            share = tl.load(shares + group, mask=there, other=0.0)[:, None]
            limited = tl.where(share == 1, limited, values + (limited - values) * share)
        _store(addresses, block, offset, changed, limited, DTYPE)
