"""Small faults to put into the kernels, one at a time: each must make at least one test fail.

`old` stands exactly once in the file. Emulator tests hold the CUDA headers, interpreter tests the Triton kernels.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Edit:
    """One fault: in `file`, `old` becomes `new`. `tests` are the pytest arguments that should notice."""

    fault: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = ()


def cuda(header: str, fault: str, old: str, new: str, test: str = "") -> Edit:
    test = test or f"test_{header}.py"
    return Edit(fault, f"csrc/include/cmaclip/{header}.cuh", old, new, (f"tests/emulator/{test}",))


def triton(operator: str, fault: str, old: str, new: str) -> Edit:
    return Edit(fault, f"kernels/{operator}.py", old, new, (f"tests/interpret/test_{operator}.py",))


ATTENTION = "test_packed_attention.py"

EDITS = (
    cuda(
        "packed_attention",
        "forward: the barrier before a tile is read is gone",
        "    isa::cp_async_wait<0>();\n    __syncthreads();\n    if (from + kColumns < visible)",
        "    isa::cp_async_wait<0>();\n    if (from + kColumns < visible)",
    ),
    cuda(
        "packed_attention",
        "forward: nobody waits for the copies",
        "    isa::cp_async_wait<0>();\n    __syncthreads();\n    if (from + kColumns < visible)",
        "    __syncthreads();\n    if (from + kColumns < visible)",
    ),
    cuda(
        "packed_attention",
        "forward: the next tile overwrites the one being read",
        "start_keys(from + kColumns, buffer ^ 1)",
        "start_keys(from + kColumns, buffer)",
    ),
    cuda(
        "packed_attention",
        "forward: the running sum is not rescaled",
        "      total[r] *= rescale;\n",
        "",
    ),
    cuda(
        "packed_attention",
        "forward: one of two columns is not rescaled",
        "        sum[n][2 * r + 1] *= rescale;\n",
        "",
    ),
    cuda(
        "packed_attention",
        "forward: the maximum misses the neighbouring lanes",
        "      tile_most[r] = fmaxf(tile_most[r], __shfl_xor_sync(kAllLanes, tile_most[r], 2));\n",
        "",
    ),
    cuda(
        "packed_attention",
        "forward: the sum misses the neighbouring lanes",
        "    total[r] += __shfl_xor_sync(kAllLanes, total[r], 1);\n",
        "",
    ),
    cuda(
        "packed_attention",
        "forward: scores are not scaled",
        "? scores[n][i] * shape.scale : -INFINITY",
        "? scores[n][i] : -INFINITY",
    ),
    cuda(
        "packed_attention",
        "forward: a row without keys divides by zero",
        "const float share = total[r] == 0 ? 0 : 1 / total[r];",
        "const float share = 1 / total[r];",
    ),
    cuda(
        "packed_attention",
        "forward: a row that has seen no key subtracts minus infinity",
        "shift[r] = most[r] == -INFINITY ? 0 : most[r];",
        "shift[r] = most[r];",
    ),
    cuda(
        "packed_attention",
        "forward: the log-sum-exp lacks the maximum",
        "most[r] + logf(total[r])",
        "logf(total[r])",
    ),
    cuda(
        "packed_attention",
        "forward: the heads' log-sum-exp lie at the stride of the keys",
        "lse[int64_t{head} * shape.queries + query] =",
        "lse[int64_t{head} * shape.keys + query] =",
    ),
    cuda(
        "packed_attention",
        "forward: every head reads the first head's keys",
        "k += head * shape.k.head, v += head * shape.v.head;\n  const int visible",
        "v += head * shape.v.head;\n  const int visible",
    ),
    cuda(
        "packed_attention",
        "the causal mask hides a query's own key",
        "query - queries.end + 1 + all",
        "query - queries.end + all",
    ),
    cuda(
        "packed_attention",
        "the causal mask aligns the first query with the first key",
        "query - queries.end + 1 + all",
        "query - queries.begin + 1",
    ),
    cuda(
        "packed_attention",
        "the causal mask is dropped from the gradients",
        "(!shape.causal || key <= query + lead)",
        "true",
    ),
    cuda(
        "packed_attention",
        "backward: the gradient of the log-sum-exp is added",
        "sum - grad_lse[at]",
        "sum + grad_lse[at]",
    ),
    cuda(
        "packed_attention",
        "backward: the slope lacks the row's mean",
        "powers[n][i] * (slopes[n][i] - mean) * shape.scale",
        "powers[n][i] * slopes[n][i] * shape.scale",
    ),
    cuda(
        "packed_attention",
        "backward: the slope is not scaled",
        "(slopes[n][i] - mean) * shape.scale;",
        "(slopes[n][i] - mean);",
    ),
    cuda(
        "packed_attention",
        "backward: queries before the tile's first key are not skipped, but one too many is",
        "max(0, token - tiled.begin - lead)",
        "max(0, token - tiled.begin - lead + 1)",
    ),
    cuda(
        "packed_attention",
        "backward: the gradients of k and v change places",
        "tile::add_weighted_rows<T, Size, kColumns>(second, powers, streamed_b + at, columns);",
        "tile::add_weighted_rows<T, Size, kColumns>(second, slopes, streamed_b + at, columns);",
    ),
    cuda(
        "packed_attention",
        "backward: the streamed queries' delta is read from the other buffer",
        "const int stat = buffer * kColumns + column;",
        "const int stat = (buffer ^ 1) * kColumns + column;",
    ),
    cuda(
        "packed_attention",
        "backward: shared memory is one buffer short",
        "Layout<T, Size>::elements(2 * warps * kRowsPerWarp + 4 * kGradTokens<T>)",
        "Layout<T, Size>::elements(2 * warps * kRowsPerWarp + 3 * kGradTokens<T>)",
    ),
    cuda(
        "tile",
        "rows past the end are read",
        "const bool valid = first + row < end &&",
        "const bool valid = first + row <= end &&",
        ATTENTION,
    ),
    cuda(
        "tile",
        "columns past the head size are read",
        "chunk * kPerAccess<T> < width;",
        "chunk * kPerAccess<T> <= width;",
        ATTENTION,
    ),
    cuda(
        "tile",
        "split TF32: the whole depth is summed in one accumulator, which truncates",
        "isa::mma_m16n8k8_tf32(slice, a_part, b_part);",
        "isa::mma_m16n8k8_tf32(sum, a_part, b_part);",
        ATTENTION,
    ),
    cuda("tile", "the rows of a tile lie unswizzled", "(chunk ^ swizzle(row))", "chunk", ATTENTION),
    cuda(
        "tile",
        "the left fragment's lower rows are the upper ones",
        "row + lane % 16, chunk + lane / 16",
        "row + lane % 8, chunk + lane / 16",
        ATTENTION,
    ),
    cuda(
        "tile",
        "the right fragment's chunks change places",
        "n * 8 + lane / 16 * 8 + lane % 8, chunk + lane / 8 % 2",
        "n * 8 + lane / 16 * 8 + lane % 8, chunk + 1 - lane / 8 % 2",
        ATTENTION,
    ),
    cuda("tile", "values are loaded untransposed", "ldmatrix_x4_trans", "ldmatrix_x4", ATTENTION),
    cuda("tile", "floats are cut to TF32", "both = Parts - 1;", "both = 0;", ATTENTION),
    cuda(
        "tile",
        "a tile's last group of eight columns is left out",
        "if (n * 8 + 8 < columns) multiply",
        "if (n * 8 + 16 < columns) multiply",
        ATTENTION,
    ),
    cuda(
        "tile",
        "the stored rows are read before they are written",
        "  __syncwarp();\n  for (int i = lane; i < kRowsPerWarp",
        "  for (int i = lane; i < kRowsPerWarp",
        ATTENTION,
    ),
    cuda(
        "tile",
        "rows of the next sequence are overwritten",
        "    if (first + r < end && chunk * kPerAccess<T> < width)\n      store",
        "    if (chunk * kPerAccess<T> < width)\n      store",
        ATTENTION,
    ),
    cuda(
        "work_list",
        "tokens past the last row are nobody's",
        "row < rows ? ends[row + 1] : tokens",
        "row < rows ? ends[row + 1] : ends[row]",
        ATTENTION,
    ),
    cuda(
        "work_list",
        "the shortest rows come first",
        "const int high = kCosts - 1 - 2 * lane, low = high - 1;",
        "const int high = 2 * lane, low = high + 1;",
        ATTENTION,
    ),
    cuda(
        "work_list",
        "a row's last tile is dropped",
        "(tiled.end - tiled.begin + tile - 1) / tile;",
        "(tiled.end - tiled.begin) / tile;",
        ATTENTION,
    ),
    cuda("work_list", "unused items keep what memory held", "items[i] = {-1, 0};", "{}", ATTENTION),
    cuda(
        "work_list",
        "rows of one cost share their place",
        "if (same >> lane == 1) next[cost] = at + count;",
        "if (same >> lane == 1) next[cost] = at;",
        ATTENTION,
    ),
    cuda("modality_pool", "absent modalities count", "score[m] = mask >> m & 1 ? expf", "score[m] = true ? expf"),
    cuda("modality_pool", "a warp's score is one lane's", "score[m] = warp_sum(score[m]);", ""),
    cuda("modality_pool", "the shares are not normalised", "score[m] /= total;", "score[m] /= 1;"),
    cuda(
        "modality_pool",
        "every task has the first modality's weights",
        "if (m > 0 && !shape.shared) w = load<Count>(weight_of(weight, shape, task, m) + d);\n        const Pack",
        "const Pack",
    ),
    cuda("modality_pool", "the slope lacks the mean", "weight * (grad - mean)", "weight * grad"),
    cuda(
        "modality_pool",
        "partial sums are read before all are written",
        "  __syncthreads();\n  for (int at = threadIdx.x; at < kTasksPerWarp",
        "  for (int at = threadIdx.x; at < kTasksPerWarp",
    ),
    triton(
        "modality_pool",
        "the slope lacks the mean",
        "share * (product - mean[:, None])",
        "share * product",
    ),
    triton(
        "modality_pool",
        "a row without modalities divides by zero",
        "tl.where(total == 0.0, 1.0, total)",
        "total",
    ),
    cuda("pack_tokens", "the scan leaves out the first warps", "ends[i] + (at > 0 ? totals[at - 1] : 0);", "ends[i];"),
    cuda("pack_tokens", "the scan forgets earlier turns", "    before += totals[kTotals - 1];\n", ""),
    cuda(
        "pack_tokens",
        "spans are not kept within their source",
        "return {first, min(max(counts[2 * row + modality], 0), size - first)};",
        "return {first, counts[2 * row + modality]};",
    ),
    cuda("pack_tokens", "starts are not read", "min(max(starts[2 * row + modality], 0), size)", "0"),
    cuda("pack_tokens", "the image has the text's type", "(is_text[t] ? 0 : shape.width) + d", "0 + d"),
    cuda(
        "pack_tokens",
        "image tokens are counted from the row's first token",
        "1).first + place - of_text.count)",
        "1).first + place)",
    ),
    cuda("pack_tokens", "the last row of a warp's tokens is kept", "++row;\n    sources[t]", "break;\n    sources[t]"),
    cuda(
        "pack_tokens",
        "what follows the last row is not cleared",
        "if (begin + t < shape.capacity) store(packed",
        "if (sources[t] != nullptr) store(packed",
    ),
    cuda(
        "pack_tokens",
        "the image's gradient is the text's",
        "modality == 0 ? 0 : span_of(shape, starts, counts, mine, 0).count;",
        "0;",
    ),
    cuda("pack_tokens", "a token's gradient is that of its first row", "holders &= holders - 1) {", "holders = 0) {"),
    cuda("pack_tokens", "the last rows are passed over", "last_row = max(last_row, last_rows[w]);", ""),
    cuda(
        "pack_tokens",
        "partial sums are read before all are written",
        "  __syncthreads();\n  for (int column",
        "  for (int column",
    ),
    cuda(
        "multitask_cross_entropy", "the running sum is not rescaled", "if (now != most) total *= expf(most - base);", ""
    ),
    cuda(
        "multitask_cross_entropy",
        "the mean counts all rows",
        "return weight_sum > 0 ? 1 / weight_sum : 0;",
        "return 1 / weight_sum;",
    ),
    cuda(
        "multitask_cross_entropy",
        "labels past the last class go unnoticed",
        "    if (label >= classes) loss = NAN;\n",
        "",
    ),
    cuda(
        "multitask_cross_entropy",
        "smoothing is over all tasks' classes",
        "sums.weighted) / static_cast<float>(classes);",
        "sums.weighted) / static_cast<float>(shape.classes);",
    ),
    cuda(
        "multitask_cross_entropy",
        "the tile is read before it is whole",
        "      __syncthreads();\n    }\n  }\n};",
        "    }\n  }\n};",
    ),
    cuda(
        "multitask_cross_entropy",
        "the label has no slope of its own",
        "      if (c + i == label) grad -= label_weight;\n",
        "",
    ),
    cuda(
        "multitask_cross_entropy",
        "unlabelled rows have a gradient",
        "grad[c] = zero;\n      continue;\n",
        "grad[c] = zero;\n",
    ),
    cuda(
        "multitask_cross_entropy",
        "the parts of tasks lie at the stride of rows",
        "row_loss[task * shape.rows + row] = loss;",
        "row_loss[row * shape.tasks + task] = loss;",
    ),
    triton(
        "packed_attention",
        "the running sum is not rescaled",
        "total = total * shrink + tl.sum(powers, axis=1)",
        "total = total + tl.sum(powers, axis=1)",
    ),
    triton(
        "packed_attention",
        "the weighted sum is not rescaled",
        "values, sums * shrink[:, None], input",
        "values, sums, input",
    ),
    triton(
        "packed_attention",
        "keys of the next row are seen",
        '        scores = tl.where(sees, scores, float("-inf"))\n',
        "",
    ),
    triton(
        "packed_attention",
        "a query sees one key too many",
        "            sees = sees & (j[None, :] <= i[:, None] + (m - n))\n        scores = tl.where",
        "            sees = sees & (j[None, :] <= i[:, None] + (m - n) + 1)\n        scores = tl.where",
    ),
    triton(
        "packed_attention",
        "the slope lacks the gradient of the log-sum-exp",
        "slope -= tl.load(grad_lse",
        "slope -= 0 * tl.load(grad_lse",
    ),
    triton("packed_attention", "the gradient of q is not scaled", "(sums * scale).to(grad_q", "sums.to(grad_q"),
    triton(
        "packed_attention",
        "tokens past the last row are not cleared",
        'tl.full([BLOCK_Q], float("-inf"), tl.float32), mask=t < tokens)',
        'tl.full([BLOCK_Q], float("-inf"), tl.float32), mask=t < 0)',
    ),
    triton(
        "pack_tokens", "the scan forgets earlier blocks", "end + tl.cumsum(tokens, axis=0)", "tl.cumsum(tokens, axis=0)"
    ),
    triton(
        "pack_tokens",
        "the image has the text's type",
        "added = tl.where(is_text[:, None], text_type, image_type)",
        "added = text_type",
    ),
    triton(
        "pack_tokens", "starts are not read", "tl.load(starts + row * 2 + modality, mask=inside, other=0)", "0 * row"
    ),
    triton(
        "pack_tokens",
        "spans are not kept within their source",
        "tl.minimum(tl.maximum(count, 0), size - first)",
        "count",
    ),
    triton(
        "pack_tokens",
        "image tokens are counted from the row's first token",
        "(image_first + place - text_count)",
        "(image_first + place)",
    ),
    triton("pack_tokens", "the search for the row stops early", "tl.static_range(STEPS)", "tl.static_range(STEPS - 1)"),
    triton(
        "pack_tokens",
        "the image's gradient is the text's",
        "tl.load(cu_seqlens + row) + tl.where(modality == 0, 0, text_count)",
        "tl.load(cu_seqlens + row)",
    ),
    triton(
        "pack_tokens", "the last row is passed over", "range(first_row, last_row + 1)", "range(first_row, last_row)"
    ),
    triton(
        "multitask_cross_entropy", "the running sum is not rescaled", "total * tl.exp(most - larger) + tl", "total + tl"
    ),
    triton(
        "multitask_cross_entropy",
        "labels past the last class go unnoticed",
        '    loss = tl.where(label >= end - first, float("nan"), loss)\n',
        "",
    ),
    triton(
        "multitask_cross_entropy",
        "the gradient is not the mean's",
        "factor = tl.load(grad_loss + task) * _inverse(tl.load(weight_sum + task))",
        "factor = tl.load(grad_loss + task)",
    ),
    triton(
        "multitask_cross_entropy",
        "every task's label stands in the first task",
        "tl.where(c == first + label, label_weight",
        "tl.where(c == label, label_weight",
    ),
    cuda(
        "multitask_binary_cross_entropy",
        "unknown targets are counted",
        "    if (target < 0) continue;\n",
        "",
    ),
    cuda(
        "multitask_binary_cross_entropy",
        "unknown targets have a gradient",
        "target < 0 ? 0 : term(",
        "term(",
    ),
    cuda(
        "multitask_binary_cross_entropy",
        "the focusing factor is taken for a constant",
        "    slope = focus * (p + gamma * other * loss);\n",
        "    slope = focus * p;\n",
    ),
    cuda(
        "multitask_binary_cross_entropy",
        "far beyond the margin the logarithm is that of small numbers",
        "q < 0.5f ? -log1pf(-q) : -logf(rest)",
        "-log1pf(-q)",
    ),
    cuda(
        "multitask_binary_cross_entropy",
        "the gradient of a class that the row has points the wrong way",
        "return {loss, positive ? -slope : slope};",
        "return {loss, slope};",
    ),
    cuda(
        "multitask_binary_cross_entropy",
        "the mean counts all elements",
        "return weight_sum > 0 ? 1 / weight_sum : 0;",
        "return 1 / weight_sum;",
    ),
    cuda(
        "multitask_binary_cross_entropy",
        "the mean is not weighted",
        "weights[part] = known * weight;",
        "weights[part] = known;",
    ),
    cuda(
        "multitask_binary_cross_entropy",
        "targets above 1 go unnoticed",
        "  if (target > 1) return {NAN, NAN};\n",
        "",
    ),
    triton(
        "multitask_binary_cross_entropy",
        "unknown targets have a gradient",
        "tl.where(target >= 0, slope, 0.0) * scale",
        "slope * scale",
    ),
    triton(
        "multitask_binary_cross_entropy",
        "only the first part of the rows is added",
        "        losses += classes\n",
        "",
    ),
    triton(
        "multitask_binary_cross_entropy",
        "there is a loss below the margin",
        "tl.where(below, 0.0, focus * log_rest)",
        "focus * log_rest",
    ),
    triton(
        "multitask_binary_cross_entropy",
        "exponents count at infinite logits",
        "tl.where(focused, gamma * (tl.where(likely, 0.0, -x) + more), 0.0)",
        "gamma * (tl.where(likely, 0.0, -x) + more)",
    ),
)
