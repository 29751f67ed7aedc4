// The fixed point of Eq. 6 on a CPU: one read of a large tensor, one of each row from memory and the rest from cache.
//
// The derivative of the modelled error, h(s) = c s #{0 < |x| <= s} - sum (|x| - s)+, increases with s and is zero at the
// fixed point. Where h(t) < 0 the fixed point lies above t, so that it depends on nothing but the magnitudes above t, the
// few outliers, and on how many others there are. The outliers are set aside while the data are read, and Eq. 6 is then
// run on them. Where h(t) >= 0 for the guess t that the read was made with, it is read again with a lower one.
//
// Sums are float32 within pieces of 4096 elements, in at least 16 partial sums, and float64 beyond.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kPiece = 4096;       // elements of a piece; as float32 it stays in the innermost cache
constexpr int64_t kLanes = 16;         // elements of a vector
constexpr int64_t kUnrolled = 4;       // vectors that a loop takes at once, so that none waits for the sum of another
constexpr int64_t kSample = 128;       // elements of each piece that the guess is made from
constexpr int64_t kParallel = 1 << 15; // elements from which a second thread pays
constexpr int64_t kLarge = 1 << 17;    // elements from which a read is dear enough for a guess made from a sample
constexpr int kReads = 5;
constexpr int kUpdates = 100;
constexpr double kTolerance = 1e-6; // 8 float32 ulp
// Outliers are kept from this share of the guess on: of a guess from a sample, from the sums alone, from a read too high.
constexpr double kSampleMargin = 0.97, kSumsMargin = 0.75, kReadMargin = 0.9;

constexpr float kNotFound = NAN;

struct Bfloat16 {
  uint16_t bits;
};

inline float to_float(float value) { return value; }
inline float to_float(_Float16 value) { return static_cast<float>(value); }
inline float to_float(Bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// The piece itself, or as float32 in `buffer`.
template <class T> const float *as_floats(const T *x, int64_t n, float *buffer) {
  for (int64_t i = 0; i < n; i++)
    buffer[i] = to_float(x[i]);
  return buffer;
}
template <> const float *as_floats<float>(const float *x, int64_t, float *) { return x; }

// Vectors as GCC and Clang know them, whatever the processor's own are.
using Floats = float __attribute__((vector_size(4 * kLanes)));
using Integers = int32_t __attribute__((vector_size(4 * kLanes)));

inline Floats load(const float *x) {
  Floats values;
  std::memcpy(&values, x, sizeof values);
  return values;
}

inline Integers magnitude_bits(Floats values) { return reinterpret_cast<Integers>(values) & 0x7fffffff; }

template <bool kSigned> inline Floats magnitude(Floats values) {
  return kSigned ? reinterpret_cast<Floats>(magnitude_bits(values)) : values > 0 ? values : Floats{};
}

inline Floats broadcast(float value) { return value - Floats{}; }

inline Floats clamp(Floats t, Floats low, Floats high) {
#ifdef __AVX512F__
  return reinterpret_cast<Floats>(_mm512_min_ps(
      _mm512_max_ps(reinterpret_cast<__m512>(t), reinterpret_cast<__m512>(low)), reinterpret_cast<__m512>(high)));
#else
  t = t < low ? low : t;
  return t > high ? high : t;
#endif
}

inline float levels_above_zero(bool is_signed, int num_bits) {
  return static_cast<float>((1 << (num_bits - (is_signed ? 1 : 0))) - 1);
}

// To the nearest integer, ties to the even one; for what is inside a grid.
inline Floats rounded(Floats t) {
#ifdef __AVX512F__
  return reinterpret_cast<Floats>(
      _mm512_roundscale_ps(reinterpret_cast<__m512>(t), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  return (t + 12582912.0f) - 12582912.0f; // 1.5 * 2^23
#endif
}

inline Floats sum_of_unrolled(const Floats *vectors) {
  static_assert(kUnrolled == 4);
  return (vectors[0] + vectors[1]) + (vectors[2] + vectors[3]);
}

inline float sum_of_lanes(Floats values) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps(reinterpret_cast<__m512>(values));
#else
  float sum = 0;
  for (int64_t lane = 0; lane < kLanes; lane++)
    sum += values[lane];
  return sum;
#endif
}

inline int32_t sum_of_lanes(Integers values) {
#ifdef __AVX512F__
  return _mm512_reduce_add_epi32(reinterpret_cast<__m512i>(values));
#else
  int32_t sum = 0;
  for (int64_t lane = 0; lane < kLanes; lane++)
    sum += values[lane];
  return sum;
#endif
}

inline int32_t highest_lane(Integers values) {
#ifdef __AVX512F__
  return _mm512_reduce_max_epi32(reinterpret_cast<__m512i>(values));
#else
  int32_t highest = values[0];
  for (int64_t lane = 1; lane < kLanes; lane++)
    highest = std::max(highest, values[lane]);
  return highest;
#endif
}

// The last n elements of a loop, with zeros behind them, which add nothing to a sum or a count.
inline Floats load_rest(const float *x, int64_t n) {
  float padded[kLanes] = {};
  std::memcpy(padded, x, n * sizeof(float));
  return load(padded);
}

struct Tail { // the magnitudes above a threshold
  double total = 0;
  int64_t count = 0;
};

struct Sums { // of what has been read
  double total = 0;
  int64_t nonzero = 0;
  uint32_t highest = 0; // largest magnitude as its bits, a negative one on an unsigned grid included
  void add(const Sums &other) {
    total += other.total;
    nonzero += other.nonzero;
    highest = std::max(highest, other.highest);
  }
};

// The outliers among what has been read, in memory that one reading leaves to the next.
struct Outliers {
  std::vector<float> room;
  int64_t count = 0;
  float threshold = 0;
  // Where n more can be written, and a vector behind them.
  float *space_for(int64_t n) {
    if (static_cast<int64_t>(room.size()) < count + n + kLanes)
      room.resize(2 * count + n + kLanes);
    return room.data() + count;
  }
  void pad() { std::fill_n(space_for(0), kLanes, 0.0f); }
};

struct Grid {
  double noise; // c, the noise factor of Eq. 4
  double start; // nearly the fixed point of Gaussian data in units of its mean magnitude
  int num_bits;
};

template <bool kSigned> Sums sums_of_piece(const float *x, int64_t n) {
  Floats totals[kUnrolled] = {};
  Integers zeros[kUnrolled] = {}, highest[kUnrolled] = {}; // comparisons give -1 where they hold
  const auto take = [&](Floats values, int64_t k) {
    const Floats m = magnitude<kSigned>(values);
    const Integers bits = magnitude_bits(values);
    totals[k] += m;
    zeros[k] += m == 0;
    highest[k] = bits > highest[k] ? bits : highest[k];
  };
  int64_t i = 0;
  for (; i + kUnrolled * kLanes <= n; i += kUnrolled * kLanes)
    for (int64_t k = 0; k < kUnrolled; k++)
      take(load(x + i + k * kLanes), k);
  for (; i + kLanes <= n; i += kLanes)
    take(load(x + i), 0);
  Sums sums;
  sums.nonzero = n;
  if (i < n) {
    take(load_rest(x + i, n - i), 0);
    sums.nonzero += kLanes - (n - i);
  }
  for (int64_t k = 1; k < kUnrolled; k++) {
    zeros[0] += zeros[k];
    highest[0] = highest[0] > highest[k] ? highest[0] : highest[k];
  }
  sums.total = sum_of_lanes(sum_of_unrolled(totals));
  sums.nonzero += sum_of_lanes(zeros[0]);
  sums.highest = static_cast<uint32_t>(highest_lane(highest[0]));
  return sums;
}

// Append the values whose magnitude is above the threshold, which is not negative; return the new end.
template <bool kSigned> float *append_above(Floats values, float threshold, float *end) {
  const Floats magnitudes = magnitude<kSigned>(values);
#ifdef __AVX512F__
  const __mmask16 above =
      _mm512_cmp_ps_mask(reinterpret_cast<__m512>(magnitudes), _mm512_set1_ps(threshold), _CMP_GT_OQ);
  _mm512_storeu_ps(end, _mm512_maskz_compress_ps(above, reinterpret_cast<__m512>(values)));
  return end + __builtin_popcount(above);
#else
  for (int64_t lane = 0; lane < kLanes; lane++) {
    *end = values[lane];
    end += magnitudes[lane] > threshold;
  }
  return end;
#endif
}

// Append what is above the threshold to `outliers`, which has room for n and a vector more; return the new end.
template <bool kSigned> float *set_aside(const float *x, int64_t n, float threshold, float *outliers) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    outliers = append_above<kSigned>(load(x + i), threshold, outliers);
  return i < n ? append_above<kSigned>(load_rest(x + i, n - i), threshold, outliers) : outliers;
}

// Of n values that have a vector of zeros behind them.
template <bool kSigned> Tail tail_of(const float *values, int64_t n, float threshold) {
  Tail tail;
  for (int64_t begin = 0; begin < n; begin += kPiece) {
    const int64_t end = std::min(n, begin + kPiece);
    Floats totals[kUnrolled] = {};
    Integers counts[kUnrolled] = {};
    const auto take = [&](Floats m, int64_t k) {
      const Integers above = m > threshold;
      totals[k] += reinterpret_cast<Floats>(reinterpret_cast<Integers>(m) & above);
      counts[k] -= above;
    };
    int64_t i = begin;
    for (; i + kUnrolled * kLanes <= end; i += kUnrolled * kLanes)
      for (int64_t k = 0; k < kUnrolled; k++)
        take(magnitude<kSigned>(load(values + i + k * kLanes)), k);
    for (; i < end; i += kLanes) // past the end only of the last piece
      take(magnitude<kSigned>(load(values + i)), 0);
    for (int64_t k = 1; k < kUnrolled; k++)
      counts[0] += counts[k];
    tail.total += sum_of_lanes(sum_of_unrolled(totals));
    tail.count += sum_of_lanes(counts[0]);
  }
  return tail;
}

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

struct Outcome {
  enum Kind { kSettled, kAlternates, kThresholdTooHigh, kUnknown } kind;
  double clip;      // settled: the fixed point; alternates: the lower clip; threshold too high: a lower one
  double other = 0; // alternates: the higher clip
};

// Eq. 6 from `start` on, given the values above a threshold, the sums over all, and a start not below the threshold.
template <bool kSigned>
Outcome recursion(const float *outliers, int64_t n, float threshold, float start, const Sums &sums, double noise) {
  const double nonzero = static_cast<double>(sums.nonzero);
  Tail tail = tail_of<kSigned>(outliers, n, start);
  if (tail.count == 0) { // from there Eq. 6 would start over from 0
    start = threshold;
    tail = tail_of<kSigned>(outliers, n, start);
    if (tail.count == 0)
      return {Outcome::kThresholdTooHigh, sums.total / nonzero};
  }
  const auto update = [&](double clip) {
    return tail.count ? tail.total / (noise * (nonzero - tail.count) + tail.count) : clip;
  };
  double before = start, clip = update(start);
  if (!(clip > threshold))
    return {Outcome::kThresholdTooHigh, clip};
  for (int i = 0; i < kUpdates; i++) {
    tail = tail_of<kSigned>(outliers, n, static_cast<float>(clip));
    const double after = update(clip);
    if (std::fabs(after - clip) <= kTolerance * clip)
      return {Outcome::kSettled, after};
    if (!(after > threshold))
      return {Outcome::kThresholdTooHigh, after};
    if (std::fabs(after - before) <= kTolerance * clip) {
      // About a magnitude that many elements share. Only if it is the only one between the two clips does h jump over
      // zero there, and nothing else can be the answer.
      const float low = static_cast<float>(std::min(clip, after)), high = static_cast<float>(std::max(clip, after));
      float smallest = INFINITY, largest = 0;
      for (int64_t k = 0; k < n; k++)
        if (const float m = std::fabs(outliers[k]); m > low && m <= high) {
          smallest = std::min(smallest, m);
          largest = std::max(largest, m);
        }
      if (smallest != largest)
        return {Outcome::kUnknown, 0};
      return {Outcome::kAlternates, std::min(clip, after), std::max(clip, after)};
    }
    before = clip;
    clip = after;
  }
  return {Outcome::kUnknown, 0};
}

// Sum of the squared errors of rounding n elements to the grid clipped at `clip`, over the square of `peak`.
template <bool kSigned> double squared_error(const float *x, int64_t n, float clip, float peak, int num_bits) {
  const float levels = levels_above_zero(kSigned, num_bits) + 1;
  const Floats low = broadcast(kSigned ? -levels : 0), high = broadcast(levels - 1);
  const float step = clip / levels;
  Floats errors = {};
  const auto take = [&](Floats values) {
    const Floats difference = (values - rounded(clamp(values / step, low, high)) * step) / peak;
    errors += difference * difference;
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    take(load(x + i));
  if (i < n)
    take(load_rest(x + i, n - i));
  return sum_of_lanes(errors);
}

// Whether the sums say it all: no clip where something is not finite or the sum overflows, 0 where all is zero.
bool known_by_sums(const Sums &sums, float *clip) {
  const bool summed = sums.highest < 0x7f800000u && sums.total <= 3e38;
  *clip = summed ? 0.0f : kNotFound;
  return !summed || sums.nonzero == 0;
}

// The elements of one clip, in memory that one or several threads read.
template <class T, bool kSigned> class Elements {
public:
  Elements(const T *x, int64_t n, int threads) : x_(x), n_(n), threads_(threads) {}

  // The clip, given a guess of it or 0. `outliers` is room to work in, which one row leaves to the next.
  float clip(const Grid &grid, float guess, Outliers &outliers) const {
    Sums sums;
    double threshold = kSampleMargin * guess;
    bool summed = false;
    if (guess == 0) {
      read(-1, &sums, nullptr);
      summed = true;
      if (float known; known_by_sums(sums, &known))
        return known;
      const double gaussian = grid.start * sums.total / sums.nonzero;
      // Below the highest magnitude, which has nothing above it.
      guess = static_cast<float>(std::min(gaussian, 0.999 * from_bits(sums.highest)));
      threshold = kSumsMargin * guess;
    }
    for (int reads = 0; reads < kReads; reads++) {
      const float from = static_cast<float>(threshold);
      read(from, summed ? nullptr : &sums, &outliers);
      summed = true;
      if (float known; known_by_sums(sums, &known))
        return known;
      const Outcome outcome = recursion<kSigned>(outliers.room.data(), outliers.count, from, std::max(guess, from), sums, grid.noise);
      switch (outcome.kind) {
      case Outcome::kSettled:
        return static_cast<float>(outcome.clip);
      case Outcome::kAlternates:
        return with_lower_error(outcome, from_bits(sums.highest), grid.num_bits);
      case Outcome::kThresholdTooHigh:
        guess = static_cast<float>(outcome.clip);
        threshold = kReadMargin * guess;
        break;
      case Outcome::kUnknown:
        return kNotFound;
      }
    }
    return kNotFound;
  }

  // A clip for a guess: that of the first elements of each piece. 0 where there is none.
  float clip_of_sample(const Grid &grid, Outliers &outliers) const {
    std::vector<float> sample;
    sample.reserve((n_ / kPiece + 1) * kSample);
    for (int64_t begin = 0; begin < n_; begin += kPiece)
      for (int64_t i = begin; i < std::min(n_, begin + kSample); i++)
        sample.push_back(to_float(x_[i]));
    const float clip = Elements<float, kSigned>(sample.data(), sample.size(), 1).clip(grid, 0, outliers);
    return clip > 0 ? clip : 0;
  }

  const T *data() const { return x_; }
  int64_t size() const { return n_; }
  int threads() const { return threads_; }

private:
  // Sums over all elements and the magnitudes above the threshold, each where it is asked for.
  void read(float threshold, Sums *sums, Outliers *outliers) const {
    if (outliers)
      outliers->threshold = threshold;
    if (threads_ == 1) {
      read_pieces(0, pieces(), threshold, sums, outliers);
      return;
    }
    std::vector<Sums> part_sums(threads_);
    std::vector<Outliers> part_outliers(threads_);
#pragma omp parallel for num_threads(threads_) schedule(static)
    for (int part = 0; part < threads_; part++)
      read_pieces(pieces() * part / threads_, pieces() * (part + 1) / threads_, threshold, sums ? &part_sums[part] : nullptr,
                  outliers ? &part_outliers[part] : nullptr);
    if (sums)
      for (const Sums &part : part_sums)
        sums->add(part);
    if (outliers) {
      outliers->count = 0;
      for (const Outliers &part : part_outliers) {
        std::copy_n(part.room.data(), part.count, outliers->space_for(part.count));
        outliers->count += part.count;
      }
      outliers->pad();
    }
  }

  void read_pieces(int64_t first, int64_t last, float threshold, Sums *sums, Outliers *outliers) const {
    float buffer[kPiece];
    Sums own;
    if (outliers)
      outliers->count = 0;
    for (int64_t piece = first; piece < last; piece++) {
      const int64_t size = piece_size(piece);
      const float *values = as_floats(x_ + piece * kPiece, size, buffer);
      if (sums)
        own.add(sums_of_piece<kSigned>(values, size));
      if (outliers) {
        float *const begin = outliers->space_for(size);
        outliers->count += set_aside<kSigned>(values, size, threshold, begin) - begin;
      }
    }
    if (outliers)
      outliers->pad();
    if (sums)
      *sums = own;
  }

  float with_lower_error(const Outcome &outcome, float peak, int num_bits) const {
    const float low = static_cast<float>(outcome.clip), high = static_cast<float>(outcome.other);
    // Added up in the order of pieces, whichever thread is done first.
    std::vector<double> low_errors(pieces()), high_errors(pieces());
#pragma omp parallel for num_threads(threads_) schedule(static) if (threads_ > 1)
    for (int64_t piece = 0; piece < pieces(); piece++) {
      float buffer[kPiece];
      const int64_t size = piece_size(piece);
      const float *values = as_floats(x_ + piece * kPiece, size, buffer);
      low_errors[piece] = squared_error<kSigned>(values, size, low, peak, num_bits);
      high_errors[piece] = squared_error<kSigned>(values, size, high, peak, num_bits);
    }
    const double low_error = std::accumulate(low_errors.begin(), low_errors.end(), 0.0);
    const double high_error = std::accumulate(high_errors.begin(), high_errors.end(), 0.0);
    return high_error < low_error ? high : low;
  }

  int64_t pieces() const { return (n_ + kPiece - 1) / kPiece; }
  int64_t piece_size(int64_t piece) const { return std::min(kPiece, n_ - piece * kPiece); }

  const T *x_;
  int64_t n_;
  int threads_;
};

// The fixed point is what is asked for.
struct FixedPoint {
  template <class T, bool kSigned>
  float operator()(const Elements<T, kSigned> &, const Grid &, float clip, const Outliers &) const {
    return clip;
  }
};

// `finish` makes the result of a row from its elements, the grid, the fixed point, and the outliers of the last read.
template <class T, bool kSigned, class Finish>
void clips(const T *x, int64_t rows, int64_t n, const Grid &grid, int threads, const Finish &finish, float *result) {
  if (rows * n < kParallel)
    threads = 1;
  if (n >= kParallel && (rows < threads || n >= kLarge)) {
    Outliers outliers;
    for (int64_t row = 0; row < rows; row++) {
      const Elements<T, kSigned> elements(x + row * n, n, threads);
      const float clip = elements.clip(grid, n >= kLarge ? elements.clip_of_sample(grid, outliers) : 0, outliers);
      result[row] = finish(elements, grid, clip, outliers);
    }
    return;
  }
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Outliers outliers;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
      const Elements<T, kSigned> elements(x + row * n, n, 1);
      const float clip = elements.clip(grid, 0, outliers);
      result[row] = finish(elements, grid, clip, outliers);
    }
  }
}

template <class T, class Finish>
void clips(const void *x, int64_t rows, int64_t n, const Grid &grid, int is_signed, int threads, const Finish &finish,
           float *result) {
  const T *const data = static_cast<const T *>(x);
  is_signed ? clips<T, true>(data, rows, n, grid, threads, finish, result)
            : clips<T, false>(data, rows, n, grid, threads, finish, result);
}

template <class Finish>
void clips(const void *x, int dtype, int64_t rows, int64_t n, const Grid &grid, int is_signed, int threads,
           const Finish &finish, float *result) {
  switch (dtype) {
  case 0:
    return clips<float>(x, rows, n, grid, is_signed, threads, finish, result);
  case 1:
    return clips<Bfloat16>(x, rows, n, grid, is_signed, threads, finish, result);
  case 2:
    return clips<_Float16>(x, rows, n, grid, is_signed, threads, finish, result);
  }
}

} // namespace

// Clips of `rows` contiguous rows of n > 0 elements each; NaN where there is none that can be proven: something is not
// finite, the sum overflows, or Eq. 6 runs in a cycle. dtype: 0 float32, 1 bfloat16, 2 float16.
extern "C" void octav_clips(const void *x, int dtype, int64_t rows, int64_t n, int num_bits, int is_signed, double noise,
                            double start, int threads, float *result) {
  clips(x, dtype, rows, n, {noise, start, num_bits}, is_signed, threads, FixedPoint{}, result);
}
