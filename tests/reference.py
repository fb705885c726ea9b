"""METRICS.md once more, in plain numpy loops and float64: slow, obvious, and importing nothing from the package.

Every function takes one sample: ``A`` is (heads, queries, keys), ``B`` is (heads, keys, queries); masks are bool
arrays, True where valid. Undefined is NaN.
"""

import functools
import itertools
import math

import numpy as np
import scipy.optimize
import scipy.special
import scipy.stats

NAN = float("nan")


def mean_defined(values):
    values = [v for v in values if not math.isnan(v)]
    return sum(values) / len(values) if values else NAN


def shannon(weights):
    return -sum(a * math.log(a) for a in weights if a > 0)


def row_is_valid(row, query_valid, keys_valid):
    if not query_valid or not keys_valid.any():
        return False
    return bool(np.isfinite(row[keys_valid]).all()) and abs(row[keys_valid].sum() - 1) <= 1e-3


def valid_rows(A, queries=None, keys=None):
    """(heads, queries) bool. ``keys`` is (keys,) or (heads, queries, keys)."""
    queries, keys = masks_of(A, queries, keys)
    return np.array(
        [[row_is_valid(A[h, q], queries[q], keys[h, q]) for q in range(A.shape[1])] for h in range(A.shape[0])]
    )


def masks_of(A, queries, keys):
    queries = np.ones(A.shape[1], bool) if queries is None else queries
    keys = np.ones(A.shape[2], bool) if keys is None else keys
    return queries, np.broadcast_to(keys, A.shape)


def wholly_masked(weights, queries=None, keys=None):
    """Whether every query is padding, or no query of any head sees a key."""
    queries, keys = masks_of(weights, queries, keys)
    return not any(queries) or not keys.any()


def row_statistics(A, queries=None, keys=None, threshold=0.1):
    """Dict of (heads,) arrays: the mean of each row statistic over the valid rows of a head."""
    valid = valid_rows(A, queries, keys)
    _, keys = masks_of(A, queries, keys)
    names = ("entropy", "effective_keys", "effective_share", "max", "min", "sparsity", "std", "mean")
    result = {name: [] for name in names}
    for h in range(A.shape[0]):
        collected = {name: [] for name in names}
        for q in range(A.shape[1]):
            if not valid[h, q]:
                continue
            a = A[h, q][keys[h, q]]
            k = len(a)
            collected["entropy"].append(shannon(a) / math.log(k) if k > 1 else NAN)
            collected["effective_keys"].append(math.exp(shannon(a)))
            collected["effective_share"].append(math.exp(shannon(a)) / k)
            collected["max"].append(a.max())
            collected["min"].append(min(a))
            collected["sparsity"].append(100 * sum(a < threshold) / k)
            collected["std"].append(math.sqrt(sum((a - 1 / k) ** 2) / k))
            collected["mean"].append(1 / k)
        for name in names:
            result[name].append(mean_defined(collected[name]))
    return {name: np.array(values) for name, values in result.items()}


def attention(query, key, scale=None, score=None, mask=None, group=1):
    """Of ``(batch, heads, tokens, width)`` the weights ``softmax(score(q k scale))`` of the keys that the mask shows.

    ``score(s, b, h, m, n)`` and ``mask(b, h, m, n)`` get the places of sample, head, query and key; ``group`` heads
    share their keys. Gives weights and what is shown; the weights of a row of which nothing is shown are NaN.
    """
    (batch, heads, queries, width), keys = query.shape, key.shape[2]
    weights, shown = np.full((batch, heads, queries, keys), NAN), np.zeros((batch, heads, queries, keys), bool)
    for b, h, m in itertools.product(range(batch), range(heads), range(queries)):
        of_head, scores = key[b, h // group], []
        for n in range(keys):
            s = sum(float(q) * float(k) for q, k in zip(query[b, h, m], of_head[n], strict=True))
            s *= width**-0.5 if scale is None else scale
            shown[b, h, m, n] = mask is None or bool(mask(b, h, m, n))
            scores.append(float(s if score is None else score(s, b, h, m, n)))
        seen = [n for n in range(keys) if shown[b, h, m, n]]
        largest = max((scores[n] for n in seen), default=0.0)
        terms = {n: math.exp(scores[n] - largest) for n in seen}
        if seen:
            weights[b, h, m] = [terms.get(n, 0.0) / sum(terms.values()) for n in range(keys)]
    return weights, shown


def joint_block(A, queries, keys, real):
    """A direction within a joint self-attention (heads, tokens, tokens): rows scaled to sum to 1 over ``keys``.

    Also (heads,) the share of attention that goes to ``keys``, averaged over the queries that are ``real`` tokens.
    """
    block = np.full((A.shape[0], len(queries), len(keys)), NAN)
    shares = []
    for h in range(A.shape[0]):
        of_head = []
        for i, q in enumerate(queries):
            share = sum(A[h, q, k] for k in keys)
            if real[q]:
                of_head.append(share)
            for j, k in enumerate(keys):
                block[h, i, j] = A[h, q, k] / share
        shares.append(sum(of_head) / len(of_head))
    return block, np.array(shares)


def lift(A, queries=None, keys=None):
    """(heads, queries, keys): weight times the number of keys that the query sees; NaN where there is no attention."""
    valid = valid_rows(A, queries, keys)
    _, keys = masks_of(A, queries, keys)
    result = np.full(A.shape, NAN)
    for h, q, k in np.ndindex(A.shape):
        if valid[h, q] and keys[h, q, k]:
            result[h, q, k] = A[h, q, k] * keys[h, q].sum()
    return result


def lift_map(A, queries=None, keys=None):
    lifts = lift(A, queries, keys)
    _, n_queries, n_keys = A.shape
    return np.array([[mean_defined(lifts[:, q, k]) for k in range(n_keys)] for q in range(n_queries)])


def received_lift(A, queries=None, keys=None):
    lifts = lift(A, queries, keys)
    return np.array([mean_defined(lifts[:, :, k].ravel()) for k in range(A.shape[2])])


def query_selectivity(A, queries=None, keys=None):
    result = []
    for rows, seen in rows_by_head(A, queries, keys):
        if len(rows) < 2 or seen < 2:
            result.append(NAN)
            continue
        mean_entropy = sum(shannon(row) for row in rows) / len(rows)
        result.append((shannon(np.mean(rows, axis=0)) - mean_entropy) / math.log(seen))
    return np.array(result)


def head_diversity(A, queries=None, keys=None):
    valid = valid_rows(A, queries, keys)
    _, keys = masks_of(A, queries, keys)
    heads = A.shape[0]
    values = []
    for q in range(A.shape[1]):
        k = sum(any(keys[h, q, key] for h in range(heads)) for key in range(A.shape[2]))
        if heads < 2 or k < 2 or not valid[:, q].all():
            continue
        rows = [np.where(keys[h, q], A[h, q], 0) for h in range(heads)]
        divergence = shannon(np.mean(rows, axis=0)) - sum(shannon(row) for row in rows) / heads
        values.append(divergence / min(math.log(heads), math.log(k)))
    return mean_defined(values)


def sink(A, queries=None, keys=None):
    """The largest mean weight of a key over the valid rows of a head; a key that is hidden from a row has 0 there."""
    result = []
    for rows, _ in rows_by_head(A, queries, keys):
        means = [sum(row[key] for row in rows) / len(rows) for key in range(A.shape[2])] if rows else [NAN]
        result.append(max(means))
    return np.array(result)


def sink_excess(A, queries=None, keys=None):
    """How far the sink is above 1 / K; NaN with one key, or fewer than four valid rows."""
    result = []
    for s, (rows, k) in zip(sink(A, queries, keys), rows_by_head(A, queries, keys), strict=True):
        result.append((s - 1 / k) / (1 - 1 / k) if k > 1 and len(rows) >= 4 else NAN)
    return np.array(result)


def rows_by_head(A, queries, keys):
    """Of each head its valid rows, with 0 where a key is hidden, and how many keys any of them sees."""
    valid = valid_rows(A, queries, keys)
    _, keys = masks_of(A, queries, keys)
    for h in range(A.shape[0]):
        chosen = [q for q in range(A.shape[1]) if valid[h, q]]
        seen = sum(any(keys[h, q, k] for q in chosen) for k in range(A.shape[2]))
        yield [np.where(keys[h, q], A[h, q], 0) for q in chosen], seen


def broken_rows(A, queries=None, keys=None):
    """(heads, queries) bool: the query is real and has a key, yet its row is no attention."""
    valid = valid_rows(A, queries, keys)
    queries, keys = masks_of(A, queries, keys)
    return queries & keys.any(-1) & ~valid


def head_weights(A, queries=None, keys=None):
    """By cell (query, key) that some head may attend to: the weight of each head, 0 of one that may not.

    A head whose row is broken has none.
    """
    valid, broken = valid_rows(A, queries, keys), broken_rows(A, queries, keys)
    _, keys = masks_of(A, queries, keys)
    cells = {}
    for q, k in np.ndindex(*A.shape[1:]):
        may = [valid[h, q] and keys[h, q, k] for h in range(A.shape[0])]
        if any(may):
            cells[q, k] = [A[h, q, k] if may[h] else 0.0 for h in range(A.shape[0]) if not broken[h, q]]
    return cells


def top_pairs(samples, top_k):
    """``(query, key, weight, lift)`` of the mean map of samples and heads; ``samples`` are (A, queries, keys).

    The lift is the mean over the heads that may attend to the key.
    """
    weights, lifts = {}, {}
    for of_sample in samples:
        for cell, found in head_weights(*of_sample).items():
            weights.setdefault(cell, []).extend(found)
        for (_, q, k), value in np.ndenumerate(lift(*of_sample)):
            lifts.setdefault((q, k), []).append(value)
    means = [(*cell, sum(found) / len(found), mean_defined(lifts[cell])) for cell, found in weights.items()]
    return sorted(means, key=lambda pair: -pair[2])[:top_k]


def pearson(x, y):
    """Pearson r of two lists; NaN where either varies by no more than float32 rounding."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    if len(x) == 0:
        return NAN
    scale_x, scale_y = (math.sqrt((values**2).mean()) for values in (x, y))
    dx, dy = x - x.mean(), y - y.mean()
    if math.sqrt((dx**2).mean()) <= 1e-6 * scale_x or math.sqrt((dy**2).mean()) <= 1e-6 * scale_y:
        return NAN
    return float((dx * dy).sum() / math.sqrt((dx**2).sum() * (dy**2).sum()))


def cells(A, B, eeg, spec, there, back, i, j):
    """(queries, keys) pairs whose two rows are valid in head i of A and head j of B and which see each other."""
    valid_a, valid_b = valid_rows(A, eeg, there), valid_rows(B, spec, back)
    _, there = masks_of(A, eeg, there)
    _, back = masks_of(B, spec, back)
    return [
        (q, k)
        for q in range(A.shape[1])
        for k in range(B.shape[1])
        if valid_a[i, q] and there[i, q, k] and valid_b[j, k] and back[j, k, q]
    ]


def alignment(A, B, eeg=None, spec=None, there=None, back=None):
    """``eeg`` / ``spec``: valid tokens; ``there`` / ``back``: valid keys of A / of B.

    Over the cells that count in both head-averaged maps, but for those of rows that are broken in some head.
    """
    x, y = head_weights(A, eeg, there), head_weights(B, spec, back)
    bad_queries, bad_keys = broken_rows(A, eeg, there).any(0), broken_rows(B, spec, back).any(0)
    both = [(q, k) for q, k in x if (k, q) in y and not bad_queries[q] and not bad_keys[k]]
    return pearson([np.mean(x[q, k]) for q, k in both], [np.mean(y[k, q]) for q, k in both])


def alignment_null(samples):
    """Mean alignment of one sample's A with another one's B; ``samples`` are (A, B) with every alignment defined."""
    pairs = [alignment(a, b) for i, (a, _) in enumerate(samples) for j, (_, b) in enumerate(samples) if i != j]
    return sum(pairs) / len(pairs) if pairs else NAN


def head_alignment_matrix(A, B, eeg=None, spec=None, there=None, back=None):
    matrix = np.zeros((A.shape[0], B.shape[0]))
    for i in range(A.shape[0]):
        for j in range(B.shape[0]):
            both = cells(A, B, eeg, spec, there, back, i, j)
            matrix[i, j] = pearson([A[i, q, k] for q, k in both], [B[j, k, q] for q, k in both])
    return matrix


def binned(scores, low, high):
    """The bin of each score among 2^14 over its range: scores that share one count as tied."""
    return np.minimum(np.floor((np.asarray(scores, float) - low) / (high - low) * 2**14), 2**14 - 1)


def auroc(correct, incorrect):
    wins = sum((c > i) + 0.5 * (c == i) for c in correct for i in incorrect)
    return wins / (len(correct) * len(incorrect))


def error_auroc(score, correct, incorrect):
    """How well a score detects errors, in the direction that METRICS.md states for it."""
    side = {"confidence": "low", "alignment": "low", "support": "low", "conflict": "high", "entropy": "high"}[score]
    return auroc(correct, incorrect) if side == "low" else auroc(incorrect, correct)


def auroc_interval(value, n, m, half_width=1.959963984540054):
    """True AUROCs that are within 1.96 Hanley-McNeil standard errors of the one seen, by trying them all."""
    inside = []
    for true in np.linspace(0, 1, 200_001):
        q1, q2 = true / (2 - true), 2 * true**2 / (1 + true)
        # With (n + m) / 2 in the place of both n and m, as Newcombe (2006) recommends.
        pairs = (n + m) / 2 - 1
        variance = (true * (1 - true) + pairs * (q1 - true**2) + pairs * (q2 - true**2)) / (n * m)
        if (value - true) ** 2 <= half_width**2 * variance:
            inside.append(true)
    return min(inside), max(inside)


@functools.cache
def t_quantile(degrees):
    """Where Student's t density has left 97.5 % behind, by adding up its area in small steps."""
    constant = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
    step, x, area = 1e-4, 0.0, 0.5
    while area < 0.975:
        area += step * constant * (1 + (x + step / 2) ** 2 / degrees) ** (-(degrees + 1) / 2)
        x += step
    return x


def mean_interval(values):
    """95 % interval of a mean of independent scores; nothing is claimed of fewer than five."""
    n = len(values)
    if n < 5:
        return NAN, NAN
    mean = sum(values) / n
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
    return mean - t_quantile(n - 1) * error, mean + t_quantile(n - 1) * error


def grouped_mean_interval(values, groups):
    """95 % interval of a mean whose samples are alike within groups; nothing is claimed of fewer than five groups."""
    ids = sorted(set(groups))
    if len(ids) < 5:
        return NAN, NAN
    mean = sum(values) / len(values)
    residuals = [sum(v - mean for v, g in zip(values, groups, strict=True) if g == i) for i in ids]
    error = math.sqrt(len(ids) / (len(ids) - 1) * sum(r**2 for r in residuals)) / len(values)
    return mean - t_quantile(len(ids) - 1) * error, mean + t_quantile(len(ids) - 1) * error


def wilson(share, effective, quantile):
    """The true proportions within ``quantile`` of their own binomial standard errors of the one seen."""

    def is_inside(true):
        return (share - true) ** 2 <= quantile**2 * true * (1 - true) / effective * (1 + 1e-9)

    def edge(inside, outside):
        if is_inside(outside):
            return outside
        for _ in range(60):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if is_inside(middle) else (inside, middle)
        return inside

    # The share itself is inside, and at 0 and 1 its neighbour.
    start = min(max(share, 1e-12), 1 - 1e-12)
    return edge(start, 0.0), edge(start, 1.0)


def proportion_interval(values, groups=None):
    """95 % interval of the share of ones, whose samples may be alike within groups; None: each is its own group."""
    groups = list(range(len(values))) if groups is None else list(groups)
    ids = sorted(set(groups))
    if len(ids) < 5:
        return NAN, NAN
    n, share = len(values), sum(values) / len(values)
    members = [[v for v, g in zip(values, groups, strict=True) if g == i] for i in ids]
    ones, zeros = sum(1 in of for of in members), sum(0 in of for of in members)
    effective = len(ids)
    if min(ones, zeros) >= 5:
        by_group = len(ids) / (len(ids) - 1) * sum(sum(v - share for v in of) ** 2 for of in members) / n**2
        by_sample = sum((v - share) ** 2 for v in values) / (n - 1) / n
        effective = n / max(1, by_group / by_sample)
    return wilson(share, effective, t_quantile(len(ids) - 1))


def auroc_variances(correct, incorrect, correct_groups, incorrect_groups):
    """The variance of an AUROC by Obuchowski (1997), whose groups are alike within, and by DeLong (1988)."""
    theta, m, n = auroc(correct, incorrect), len(correct), len(incorrect)
    right = [sum((c > i) + 0.5 * (c == i) for i in incorrect) / n for c in correct]
    wrong = [sum((c > i) + 0.5 * (c == i) for c in correct) / m for i in incorrect]
    by_sample = sum((v - theta) ** 2 for v in right) / (m - 1) / m + sum((v - theta) ** 2 for v in wrong) / (n - 1) / n
    ids = sorted(set(correct_groups) | set(incorrect_groups))
    i10, i01, i11 = len(set(correct_groups)), len(set(incorrect_groups)), len(ids)
    s10 = s01 = s11 = 0.0
    for i in ids:
        a = sum(v - theta for v, g in zip(right, correct_groups, strict=True) if g == i)
        b = sum(v - theta for v, g in zip(wrong, incorrect_groups, strict=True) if g == i)
        s10, s01, s11 = s10 + a * a, s01 + b * b, s11 + a * b
    s10, s01, s11 = s10 * i10 / (i10 - 1) / m, s01 * i01 / (i01 - 1) / n, s11 * i11 / (i11 - 1)
    return s10 / m + s01 / n + 2 * s11 / (m * n), by_sample


def grouped_auroc_interval(correct, incorrect, correct_groups, incorrect_groups):
    """As ``auroc_interval``, with the variance times that by groups over that by samples, and Student's quantile."""
    by_group, by_sample = auroc_variances(correct, incorrect, correct_groups, incorrect_groups)
    groups = len(set(correct_groups) | set(incorrect_groups))
    samples = len(correct) + len(incorrect)
    effect = by_group / by_sample if min(by_group, by_sample) > 0 else samples / groups
    return auroc_interval(
        auroc(correct, incorrect), len(correct), len(incorrect), t_quantile(groups - 1) * math.sqrt(effect)
    )


def class_adjusted_gap(scores, classes, correct):
    gaps = []
    for c in sorted(set(classes)):
        hit = [s for s, k, ok in zip(scores, classes, correct, strict=True) if k == c and ok and not math.isnan(s)]
        miss = [s for s, k, ok in zip(scores, classes, correct, strict=True) if k == c and not ok and not math.isnan(s)]
        if hit and miss:
            gaps.append(np.mean(hit) - np.mean(miss))
    return float(np.mean(gaps)) if gaps else NAN


# Probes: what each modality says on its own.


def pooled(tokens, real):
    """Mean, maximum and standard deviation of a sample's real tokens, one after the other."""
    kept = np.array([token for token, is_real in zip(tokens, real, strict=True) if is_real])
    return np.concatenate([kept.mean(0), kept.max(0), kept.std(0)])


def round_robin(keys, hash_of, folds=5):
    """Groups in the order of their hashes, one fold after the other."""
    order = sorted(set(keys), key=hash_of)
    return [order.index(key) % folds for key in keys]


def discriminant_scores(X, y, n_classes, shrinkage=0.1):
    """A function of one x that gives its log probabilities but for a constant; -inf for a class without samples."""
    present = [c for c in range(n_classes) if any(label == c for label in y)]
    means = {c: np.mean([x for x, label in zip(X, y, strict=True) if label == c], axis=0) for c in present}
    d = len(X[0])
    S = np.zeros((d, d))
    for x, label in zip(X, y, strict=True):
        S += np.outer(x - means[label], x - means[label])
    S /= len(X) - len(present)
    D = np.diag(np.sqrt(np.diag(S)))
    correlations = np.linalg.inv(D) @ S @ np.linalg.inv(D)
    inverse = np.linalg.inv(D @ ((1 - shrinkage) * correlations + shrinkage * np.eye(d)) @ D)

    def scores(x):
        found = []
        for c in range(n_classes):
            if c not in present:
                found.append(-math.inf)
                continue
            prior = sum(label == c for label in y) / len(y)
            found.append(x @ inverse @ means[c] - means[c] @ inverse @ means[c] / 2 + math.log(prior))
        return np.array(found)

    return scores


def inverse_temperature(scores, y):
    """The factor with the smallest mean log loss, by scipy's search."""
    known = [(row, label) for row, label in zip(scores, y, strict=True) if row[label] > -math.inf]

    def loss(log_factor):
        rows = [(math.exp(log_factor) * row, label) for row, label in known]
        return float(np.mean([scipy.special.logsumexp(row) - row[label] for row, label in rows]))

    bounds = math.log(0.01), 0
    return math.exp(scipy.optimize.minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-9}).x)


def cross_fitted_probe(X, y, folds, n_classes):
    """(samples, classes) probabilities, each sample by a fit of the other folds' labelled samples.

    The fit's temperature is that of fits which leave out one more fold, on the labelled samples of that.
    """

    def fit_without(*left_out):
        others = [i for i in range(len(X)) if folds[i] not in left_out and 0 <= y[i] < n_classes]
        return discriminant_scores([X[i] for i in others], [y[i] for i in others], n_classes)

    result = [None] * len(X)
    for fold in sorted(set(folds)):
        scores, labels = [], []
        for other in sorted(set(folds) - {fold}):
            inner = fit_without(fold, other)
            for i in range(len(X)):
                if folds[i] == other and 0 <= y[i] < n_classes:
                    scores.append(inner(X[i]))
                    labels.append(y[i])
        factor, whole = inverse_temperature(scores, labels), fit_without(fold)
        for i in range(len(X)):
            if folds[i] == fold:
                given = factor * whole(X[i])
                exponents = np.exp(given - given.max())
                result[i] = exponents / exponents.sum()
    return np.array(result)


def macro_auroc(probabilities, y, groups):
    """Mean over classes of the share of pairs in order, and its standard error by group (DeLong's placements)."""
    n_classes = len(probabilities[0])
    aurocs, influence = [], np.zeros(len(y))
    for c in range(n_classes):
        positive = [i for i, label in enumerate(y) if label == c]
        negative = [i for i, label in enumerate(y) if label != c]
        ordered = {
            (i, j): (probabilities[i][c] > probabilities[j][c]) + (probabilities[i][c] == probabilities[j][c]) / 2
            for i in positive
            for j in negative
        }
        value = np.mean([*ordered.values()])
        aurocs.append(value)
        for i in positive:
            influence[i] += (np.mean([ordered[i, j] for j in negative]) - value) / len(positive) / n_classes
        for j in negative:
            influence[j] += (np.mean([ordered[i, j] for i in positive]) - value) / len(negative) / n_classes
    sums = [sum(influence[i] for i in range(len(y)) if groups[i] == g) for g in sorted(set(groups))]
    error = math.sqrt(len(sums) / (len(sums) - 1) * sum(one**2 for one in sums))
    return float(np.mean(aurocs)), error


def calibration_error(confidence, right, bins):
    """Mean over samples of how far confidence and accuracy are apart in bins of equal size."""
    order = sorted(range(len(right)), key=lambda i: confidence[i])
    return sum(abs(sum(confidence[i] - right[i] for i in one)) for one in np.array_split(np.array(order), bins)) / len(
        right
    )


def conflict(probes):
    """The chance that independent draws of two modalities differ, the mean over all pairs of modalities."""
    chances = []
    for a in range(len(probes)):
        for b in range(a + 1, len(probes)):
            chances.append(sum(p * q for i, p in enumerate(probes[a]) for j, q in enumerate(probes[b]) if i != j))
    return sum(chances) / len(chances)


def supporters(probes, predicted):
    """The modalities whose most probable class is this one, of (modalities, classes) of one sample."""
    return [m for m, probe in enumerate(probes) if max(range(len(probe)), key=lambda c: probe[c]) == predicted]


def support(probes, predicted):
    """The sum of log probabilities of the predicted class, each at least -15."""
    return sum(max(math.log(probe[predicted]), -15.0) if probe[predicted] > 0 else -15.0 for probe in probes)


def support_cell(probes, predicted):
    """Who supports a prediction, in words."""
    who = supporters(probes, predicted)
    if not who:
        first = [max(range(len(probe)), key=lambda c: probe[c]) for probe in probes]
        return "agree" if len(set(first)) == 1 else "differ"
    return tuple(who) if len(probes) == 2 else len(who)


def right_cell(probes, joint, target):
    """Whose probe is right, in words."""
    who = supporters(probes, target)
    if not who:
        return "joint only" if supporters([joint], target) else "none"
    return tuple(who) if len(probes) == 2 else len(who)


# Does a score detect errors that confidence does not?


def error_probabilities(scores, wrong, folds):
    """Logistic regression with a ridge of 1 on z-scores, by a general optimiser, without the sample's own fold."""
    scores, wrong = np.asarray(scores, float), np.asarray(wrong, float)
    found = np.zeros(len(wrong))
    for fold in sorted(set(folds)):
        out = np.array([one == fold for one in folds])
        mean, deviation = scores[~out].mean(0), scores[~out].std(0)
        z, labels = (scores - mean) / deviation, wrong[~out]

        def loss(w, z=z[~out], labels=labels):
            logits = w[0] + z @ w[1:]
            return np.sum(np.logaddexp(0, logits) - labels * logits) + np.sum(w[1:] ** 2) / 2

        w = scipy.optimize.minimize(loss, np.zeros(scores.shape[1] + 1), tol=1e-12).x
        found[out] = 1 / (1 + np.exp(-(w[0] + z[out] @ w[1:])))
    return found


def placements(scores, positive):
    """AUROC by all pairs, and of each sample how far its own share of pairs in order is from it, over its kind's n."""
    kinds = [i for i, one in enumerate(positive) if one], [i for i, one in enumerate(positive) if not one]
    ordered = {(i, j): (scores[i] > scores[j]) + (scores[i] == scores[j]) / 2 for i in kinds[0] for j in kinds[1]}
    value = sum(ordered.values()) / len(ordered)
    influence = [0.0] * len(scores)
    for i in kinds[0]:
        influence[i] = (sum(ordered[i, j] for j in kinds[1]) / len(kinds[1]) - value) / len(kinds[0])
    for j in kinds[1]:
        influence[j] = (sum(ordered[i, j] for i in kinds[0]) / len(kinds[0]) - value) / len(kinds[1])
    return value, influence


def added_value(confidence, score, wrong, groups, folds):
    """Differences of AUROC and log loss between error models with and without a score, each with its 95 % CI."""
    logit = [math.log(p / (1 - p)) for p in (min(max(one, 1e-6), 1 - 1e-6) for one in confidence)]
    base = error_probabilities([[one] for one in logit], wrong, folds)
    model = error_probabilities([*zip(logit, score, strict=True)], wrong, folds)
    (auroc, influence), (baseline, of_base) = placements(model, wrong), placements(base, wrong)
    losses = [
        math.log(b if w else 1 - b) - math.log(m if w else 1 - m) for b, m, w in zip(base, model, wrong, strict=True)
    ]
    names, n = sorted(set(groups)), len(wrong)
    q = scipy.stats.t.ppf(0.975, len(names) - 1)

    def interval(value, terms):
        sums = [sum(one for one, g in zip(terms, groups, strict=True) if g == name) for name in names]
        half = q * math.sqrt(len(names) / (len(names) - 1) * sum(one**2 for one in sums))
        return value, value - half, value + half

    mean = sum(losses) / n
    return (
        interval(auroc - baseline, [a - b for a, b in zip(influence, of_base, strict=True)]),
        interval(mean, [(one - mean) / n for one in losses]),
    )


def risk_coverage(error, wrong, coverage):
    """Area under the risk-coverage curve, and the risk at a coverage; tied samples in every order alike."""
    n, risks = len(error), []
    for kept in range(1, n + 1):
        limit = sorted(error)[kept - 1]
        below = [w for e, w in zip(error, wrong, strict=True) if e < limit]
        tied = [w for e, w in zip(error, wrong, strict=True) if e == limit]
        risks.append((sum(below) + (kept - len(below)) * sum(tied) / len(tied)) / kept)
    return sum(risks) / n, risks[math.ceil(coverage * n - 1e-9) - 1]


# Contribution: what the model uses.


def game_values(says, partners, chosen, modalities):
    """By sample and subset the mean over partners of what is said of the sample's class.

    ``says(sources)`` gives (classes,) for a sample made of modality m of sample sources[m].
    """
    values = []
    for i, others in enumerate(partners):
        of_sample = {}
        for bits in range(2**modalities):
            said = [says([i if bits >> m & 1 else j for m in range(modalities)])[chosen[i]] for j in others]
            of_sample[frozenset(m for m in range(modalities) if bits >> m & 1)] = sum(said) / len(said) if said else NAN
        values.append(of_sample)
    return values


def shapley(values, modalities):
    """By the definition: the mean over all orders of what a modality adds to those before it."""
    orders = list(itertools.permutations(range(modalities)))
    phi = [0.0] * modalities
    for order in orders:
        for place, m in enumerate(order):
            before = frozenset(order[:place])
            phi[m] += (values[before | {m}] - values[before]) / len(orders)
    return phi


def shapley_interaction(values, modalities):
    """Grabisch and Roubens 1999 of modalities 0 and 1, with the pair as one player among all orders."""
    others = range(2, modalities)
    orders = list(itertools.permutations(["pair", *others]))
    total = 0.0
    for order in orders:
        before = frozenset(order[: order.index("pair")])
        total += values[before | {0, 1}] - values[before | {0}] - values[before | {1}] + values[before]
    return total / len(orders)


def additive_fit(rows, columns, values, samples):
    """(samples, samples) of the least-squares a_i + b_j, by numpy's minimum-norm solution."""
    design = np.zeros((len(rows), 2 * samples))
    for k, (i, j) in enumerate(zip(rows, columns, strict=True)):
        design[k, i] = design[k, samples + j] = 1
    solution = np.linalg.lstsq(design, np.asarray(values), rcond=None)[0]
    return solution[:samples, None] + solution[None, samples:]


def contribution_errors(pairs, values, chosen):
    """Standard error of a contribution of two modalities: what the fit leaves over of each sample's pairs."""
    samples, pairs = len(chosen), list(pairs)
    rows, columns = zip(*pairs, strict=True)
    freedom = len(pairs) - 2 * samples + 1
    errors = []
    for i, c in enumerate(chosen):
        fit = additive_fit(rows, columns, [one[c] for one in values], samples)
        rest = [
            [one[c] - fit[pair] for pair, one in zip(pairs, values, strict=True) if pair[side] == i] for side in (0, 1)
        ]
        whole = [*rest[0], *rest[1]]
        spread = sum(x**2 for x in whole) / len(whole) * len(pairs) / freedom
        variance = 0.0
        for of_side in rest:
            # v(a) and v(b), each with a half in phi; v(all) and v(none) are known.
            n = len(of_side)
            variance += 0.25 * spread / n * (1 + 1 / n) * (1 - n / (samples - 1))
        errors.append(math.sqrt(variance))
    return errors


def emap(table):
    """Hessel and Lee 2020 at the diagonal of a whole (samples, samples) table: row + column - all."""
    return np.array([table[i].mean() + table[:, i].mean() - table.mean() for i in range(len(table))])


def received_attention(A, queries=None, keys=None):
    """Mean over heads and queries of the weight that each key gets."""
    valid = valid_rows(A, queries, keys)
    _, sees = masks_of(A, queries, keys)
    cells = [(h, q) for h in range(A.shape[0]) for q in range(A.shape[1]) if valid[h, q]]
    return [
        sum(A[h, q, k] for h, q in cells if sees[h, q, k]) / len(cells) if any(sees[h, q, k] for h, q in cells) else NAN
        for k in range(A.shape[2])
    ]


def keys_to_replace(scores):
    """For a quarter, a half and three quarters the keys of largest score, for each those of smallest, and all."""
    known = [k for k in range(len(scores)) if scores[k] == scores[k]]
    order = sorted(known, key=lambda k: -scores[k])
    counts = [min(max(1, math.floor(share * len(known) + 0.5)), len(known) - 1) for share in (0.25, 0.5, 0.75)]
    return [order[:n] for n in counts] + [order[len(order) - n :] for n in counts] + [order]


def ranking_gain(replaced):
    """Of one sample: probabilities after each of `keys_to_replace`."""
    return sum(replaced[3 + i] - replaced[i] for i in range(3)) / 3


def faithfulness(intact, replaced):
    """Sums over samples divided: intact probabilities, and those after each replacement."""
    costs = [p - after[6] for p, after in zip(intact, replaced, strict=True)]
    return sum(map(ranking_gain, replaced)) / sum(costs)
