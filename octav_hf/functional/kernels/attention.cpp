// Integer attention for AVX512-VNNI: both matmuls, the softmax and its quantization, one query at a time.
//
// A VNNI instruction adds four uint8 * int8 products to each of 16 int32 sums, so four neighbours along the contracted
// dimension must be adjacent in memory. Keys and values are copied into this layout; queries and probabilities have it.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <immintrin.h>
#include <vector>

namespace {

constexpr int64_t kLanes = 16, kGroup = 4;

int64_t padded(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

// exp(x) for x <= 0, within 2 ulp: 2^n times a polynomial of the remainder, which is at most ln(2) / 2.
__m512 exp16(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fmadd_ps(n, _mm512_set1_ps(-0.693359375f), x);
  r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691e-4f);
  for (float c : {1.3981999e-3f, 8.3334519e-3f, 4.1665796e-2f, 1.6666665e-1f, 5.0000001e-1f, 1.0f, 1.0f})
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, n); // for x = -inf p is NaN, but the result is 0
}

// sums[columns] += codes[4 * groups] times matrix [groups, columns, 4]; columns is a multiple of 16.
void multiply(const uint8_t *codes, const int8_t *matrix, int64_t groups, int64_t columns, int32_t *sums) {
  int64_t column = 0;
  const auto block = [&](auto width) {
    constexpr int count = decltype(width)::value;
    __m512i sum[count];
    for (int i = 0; i < count; ++i)
      sum[i] = _mm512_loadu_si512(sums + column + i * kLanes);
    for (int64_t group = 0; group < groups; ++group) {
      int32_t four;
      std::memcpy(&four, codes + group * kGroup, sizeof four);
      const __m512i broadcast = _mm512_set1_epi32(four);
      const int8_t *row = matrix + (group * columns + column) * kGroup;
      for (int i = 0; i < count; ++i)
        sum[i] = _mm512_dpbusd_epi32(sum[i], broadcast, _mm512_loadu_si512(row + i * kLanes * kGroup));
    }
    for (int i = 0; i < count; ++i)
      _mm512_storeu_si512(sums + column + i * kLanes, sum[i]);
    column += count * kLanes;
  };
  while (columns - column >= 8 * kLanes)
    block(std::integral_constant<int, 8>());
  while (columns - column >= 4 * kLanes)
    block(std::integral_constant<int, 4>());
  while (columns - column >= 2 * kLanes)
    block(std::integral_constant<int, 2>());
  while (columns > column)
    block(std::integral_constant<int, 1>());
}

// Softmax of scores, quantized to codes; false if every score is -inf.
bool softmax_codes(float *scores, int64_t padded_count, float step, float high, uint8_t *codes) {
  __m512 top = _mm512_set1_ps(-INFINITY);
  for (int64_t i = 0; i < padded_count; i += kLanes)
    top = _mm512_max_ps(top, _mm512_loadu_ps(scores + i));
  const float largest = _mm512_reduce_max_ps(top);
  if (largest == -INFINITY)
    return false;
  __m512 total = _mm512_setzero_ps();
  for (int64_t i = 0; i < padded_count; i += kLanes) {
    const __m512 e = exp16(_mm512_sub_ps(_mm512_loadu_ps(scores + i), _mm512_set1_ps(largest)));
    _mm512_storeu_ps(scores + i, e);
    total = _mm512_add_ps(total, e);
  }
  const __m512 sum = _mm512_set1_ps(_mm512_reduce_add_ps(total)), divisor = _mm512_set1_ps(step == 0 ? 1 : step);
  for (int64_t i = 0; i < padded_count; i += kLanes) {
    const __m512 probability = _mm512_div_ps(_mm512_loadu_ps(scores + i), sum);
    const __m512 k = _mm512_roundscale_ps(_mm512_div_ps(probability, divisor), 0);
    const __m512i code = _mm512_cvtps_epi32(_mm512_min_ps(k, _mm512_set1_ps(high)));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(codes + i), _mm512_cvtusepi32_epi8(code));
  }
  return true;
}

} // namespace

// query [batch, heads, L, E], key [batch, heads, S, E], value [batch, heads, S, V]: contiguous codes, each counted from
// its lowest integer. mask: null, or added to the scores; mask_strides are those of batch, heads and L.
// result [batch, L, heads, V].
extern "C" void attention(const uint8_t *query, const uint8_t *key, const uint8_t *value, const int64_t *sizes,
                          const int32_t *lowest, const float *mask, const int64_t *mask_strides, float score_scale,
                          float step, float high, float result_scale, float *result, int threads) {
  const int64_t batch = sizes[0], heads = sizes[1], L = sizes[2], S = sizes[3], E = sizes[4], V = sizes[5];
  const int64_t e_groups = padded(E, kGroup) / kGroup, s_groups = padded(S, kGroup) / kGroup;
  const int64_t s_columns = padded(S, kLanes), v_columns = padded(V, kLanes);
#pragma omp parallel num_threads(threads)
  {
    std::vector<int8_t> keys(e_groups * s_columns * kGroup), values(s_groups * v_columns * kGroup);
    std::vector<int32_t> key_sums(s_columns), sums(std::max(s_columns, v_columns));
    std::vector<uint8_t> row(e_groups * kGroup), codes(s_columns);
    std::vector<float> scores(s_columns);
#pragma omp for schedule(static)
    for (int64_t head = 0; head < batch * heads; ++head) {
      for (int64_t s = 0; s < S; ++s) {
        key_sums[s] = 0;
        for (int64_t e = 0; e < E; ++e) {
          const int32_t k = key[(head * S + s) * E + e] + lowest[1];
          key_sums[s] += lowest[0] * k;
          keys[(e / kGroup * s_columns + s) * kGroup + e % kGroup] = static_cast<int8_t>(k);
        }
        for (int64_t v = 0; v < V; ++v)
          values[(s / kGroup * v_columns + v) * kGroup + s % kGroup] =
              static_cast<int8_t>(value[(head * S + s) * V + v] + lowest[2]);
      }
      const float *of_head = mask + head / heads * mask_strides[0] + head % heads * mask_strides[1];
      for (int64_t l = 0; l < L; ++l) {
        std::memcpy(row.data(), query + (head * L + l) * E, E);
        std::copy(key_sums.begin(), key_sums.end(), sums.begin());
        multiply(row.data(), keys.data(), e_groups, s_columns, sums.data());
        for (int64_t s = 0; s < S; ++s)
          scores[s] = sums[s] * score_scale + (mask ? of_head[l * mask_strides[2] + s] : 0);
        std::fill(scores.begin() + S, scores.end(), -INFINITY);
        float *out = result + ((head / heads * L + l) * heads + head % heads) * V;
        std::fill(sums.begin(), sums.begin() + v_columns, 0);
        if (softmax_codes(scores.data(), s_columns, step, high, codes.data()))
          multiply(codes.data(), values.data(), s_groups, v_columns, sums.data());
        for (int64_t v = 0; v < V; ++v)
          out[v] = sums[v] * result_scale;
      }
    }
  }
}
