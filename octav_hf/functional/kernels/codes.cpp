// Integer codes of a quantized tensor in one pass: round_to_codes of fake_quantize.py.
#include <cmath>
#include <cstdint>

namespace {

struct Grid {
  float low, high, offset;
};

template <bool from_lowest, typename Code>
inline void round_row(const float *x, int64_t length, float clip, Grid grid, Code *codes) {
  const float low = grid.low, high = grid.high, offset = grid.offset;
  const float step = clip / (high + 1);
  const float divisor = step == 0 ? 1 : step;
  const float lowest = from_lowest ? low : 0;
#pragma omp simd
  for (int64_t i = 0; i < length; ++i) {
    float k = std::nearbyint((x[i] - offset) / divisor);
    k = k < low ? low : k;
    k = k > high ? high : k;
    codes[i] = static_cast<Code>(static_cast<int32_t>(k - lowest));
  }
}

} // namespace

// x: rows of `length` adjacent elements, in three dimensions with these sizes and strides. codes: contiguous; uint8
// counted from the lowest integer if `as_bytes`, otherwise float. clips: one per row if `per_row`, otherwise one.
extern "C" void round_to_codes(const float *x, const int64_t *sizes, const int64_t *strides, int64_t length,
                               const float *clips, bool per_row, float low, float high, float offset, bool as_bytes,
                               void *codes, int threads) {
  const int64_t rows = sizes[0] * sizes[1] * sizes[2];
  const Grid grid{low, high, offset};
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t third = row % sizes[2], second = row / sizes[2] % sizes[1], first = row / sizes[2] / sizes[1];
    const float *values = x + first * strides[0] + second * strides[1] + third * strides[2];
    const float clip = clips[per_row ? row : 0];
    if (as_bytes)
      round_row<true>(values, length, clip, grid, static_cast<uint8_t *>(codes) + row * length);
    else
      round_row<false>(values, length, clip, grid, static_cast<float *>(codes) + row * length);
  }
}
