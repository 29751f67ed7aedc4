// Clips on a CPU: magnitude tables, clips computed from tables, and clips of rows that are too short for a table.
//
// table.py, octav.py and mse.py explain the formulas. Clips do not depend on the number of threads: tables hold
// integers, and one thread adds the sums of a short row.

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

constexpr int64_t kBins = 1 << 15;            // of each sign
constexpr int64_t kNotFinite = 255 << 7;      // the first bin of Inf and NaN
constexpr int64_t kWindow = 32 * 128;         // bins below the highest that are used
constexpr int64_t kParallel = 1 << 15;        // elements that make a thread worthwhile
constexpr int64_t kMostPacked = 1 << 23;      // values that a packed table can count
constexpr uint64_t kPackedValue = 1ull << 40; // adds 1 to the count in a packed bin; the lower bits sum the rests
constexpr int64_t kPiece = 4096;              // values that stay in cache
constexpr int kMostClips = 64;                // in a search
constexpr int kUpdates = 12;                  // of Eq. 6 before bisection
constexpr double kTolerance = 1e-7;           // relative tolerance of the fixed point

struct Bfloat16 {
  uint16_t bits;
};

float to_float(float x) { return x; }
float to_float(_Float16 x) { return static_cast<float>(x); }
float to_float(Bfloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

template <class T> uint32_t bits_of(T x) { return std::bit_cast<uint32_t>(to_float(x)); }

struct Grid {
  bool is_signed;
  int levels;   // steps per clip
  double noise; // noise factor c of Eq. 4
  double start; // approximate fixed point for Gaussian data, in units of the mean magnitude

  Grid(int64_t num_bits, bool is_signed) : is_signed(is_signed), levels(1 << (num_bits - is_signed)) {
    noise = std::pow(4.0, -num_bits) / (is_signed ? 3 : 12);
    start = (std::sqrt(-2 * std::log(noise)) - 1.05) * std::sqrt(M_PI / 2);
  }
};

// Counting

// Counts and sums of rests per bin, int64 [2, kBins] each: positive values, then values with a minus sign.
struct Table {
  int64_t *counts, *rests;
  int64_t first = kBins - 1, last = 0; // apart from the bin of zeros, only bins in this range are filled
};

// A packed bin holds count and sum of rests in one number, so that counting a value takes one addition.
struct Packed {
  std::vector<uint64_t> bins = std::vector<uint64_t>(2 * kBins); // all zero between calls
  uint16_t least, most; // first filled bin minus 1 (which wraps around for the bin of zeros), and last filled bin
};

template <class T> void count_piece(const T *x, int64_t n, Packed &packed) {
  uint16_t least = packed.least, most = packed.most;
#pragma omp simd reduction(min : least) reduction(max : most)
  for (int64_t i = 0; i < n; i++) {
    const uint16_t bin = bits_of(x[i]) >> 16 & 0x7fff;
    least = std::min<uint16_t>(least, bin - 1);
    most = std::max(most, bin);
  }
  packed.least = least;
  packed.most = most;
  uint64_t *const bins = packed.bins.data();
#pragma GCC unroll 4
  for (int64_t i = 0; i < n; i++) {
    const uint32_t bits = bits_of(x[i]);
    bins[bits >> 16] += kPackedValue + (bits & 0xffff);
  }
}

// Count the values of x in a table.
template <class T> void count(const T *x, int64_t n, int64_t threads, Table &table) {
  threads = std::clamp<int64_t>(n / kParallel, 1, threads);
  const int64_t parts = threads * (n / (threads * kMostPacked) + 1);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t part = 0; part < parts; part++) {
    static thread_local Packed packed;
    packed.least = -1;
    packed.most = 0;
    const int64_t end = n * (part + 1) / parts;
    for (int64_t begin = n * part / parts; begin < end; begin += kPiece)
      count_piece(x + begin, std::min(kPiece, end - begin), packed);
    const int64_t first = packed.least + 1, last = packed.most;
#pragma omp critical(octav_hf_unpack)
    {
      for (int64_t sign = 0; sign < 2 * kBins; sign += kBins)
        for (int64_t bin = 0; bin <= last; bin = std::max(bin + 1, first)) {
          table.counts[sign + bin] += static_cast<int64_t>(packed.bins[sign + bin] / kPackedValue);
          table.rests[sign + bin] += static_cast<int64_t>(packed.bins[sign + bin] % kPackedValue);
          packed.bins[sign + bin] = 0;
        }
      table.first = std::min(table.first, first);
      table.last = std::max(table.last, last);
    }
  }
}

// Clips computed from a table

// A bin of the magnitudes of one sign, with the totals of the higher bins; see Tails in table.py.
struct Bin {
  double edge, width, spread, mean, crowd, place, count_above, excess_above;

  double count(double threshold) const {
    const double u = place_of(threshold);
    return count_above + spread * std::clamp((1 - u) * (1 + 6 * u * (mean - 0.5)), 0.0, 1.0) + (u < place ? crowd : 0);
  }

  double excess(double threshold) const {
    const double u = place_of(threshold), line = (1 - u) * (1 - u) * (0.5 + (mean - 0.5) * (1 + 2 * u));
    const double inside = spread * std::max({line, mean - u, 0.0}) + crowd * std::max(place - u, 0.0);
    return excess_above + count_above * (edge + width - threshold) + width * inside;
  }

private:
  double place_of(double threshold) const { return std::clamp((threshold - edge) / width, 0.0, 1.0); }
};

// The bins of one sign in a table, computed on demand from the one above the highest filled bin downwards.
class Tail {
public:
  Tail(const Table &table, int64_t sign) : counts_(table.counts + sign), rests_(table.rests + sign), highest_(table.last) {
    while (highest_ > 0 && counts_[highest_] == 0)
      highest_--;
    for (int64_t bin = std::max<int64_t>(table.first, 1); bin <= highest_; bin++)
      nonzero_ += counts_[bin];
  }

  int64_t nonzero() const { return nonzero_; }

  // Upper bound of the largest magnitude, exact if it is alone in its bin.
  double top() const {
    const double place = counts_[highest_] > 1 ? 1 : rests_[highest_] / 65536.0;
    return highest_ == 0 ? 0 : edge(highest_) + width(highest_) * place;
  }

  const Bin &at(double threshold) {
    const int64_t number = std::bit_cast<uint32_t>(static_cast<float>(threshold)) >> 16;
    const int64_t lowest = std::max<int64_t>(highest_ - kWindow + 1, 1), above = highest_ + 1;
    const size_t index = above - std::clamp(number, lowest, above);
    while (bins_.size() <= index)
      add_next();
    return bins_[index];
  }

private:
  static double width(int64_t bin) { return std::ldexp(1.0, std::max<int>(bin >> 7, 1) - 134); }
  static double edge(int64_t bin) { return ((bin & 127) + (bin > 127 ? 128 : 0)) * width(bin); }

  void add_next() {
    const int64_t number = highest_ + 1 - static_cast<int64_t>(bins_.size());
    const double count = counts_[number], mean = rests_[number] / (65536 * std::max(count, 1.0));
    const double below = counts_[std::max<int64_t>(number - 1, 1)], above = counts_[number + 1];
    const bool at_one_place = count == 1 || mean == 0, is_crowded = at_one_place || count > 2 * (below + above);
    const double others = at_one_place ? 0 : std::min(below, above), crowd = is_crowded ? count - others : 0;
    const double place = std::clamp((count * mean - others / 2) / std::max(crowd, 1.0), 0.0, 1.0);
    const double spread_mean = is_crowded ? 0.5 : mean;
    bins_.push_back({edge(number), width(number), count - crowd, spread_mean, crowd, place, count_, excess_});
    excess_ += width(number) * (count * mean + count_);
    count_ += count;
  }

  const int64_t *counts_, *rests_;
  int64_t highest_, nonzero_ = 0;
  std::vector<Bin> bins_;
  double count_ = 0, excess_ = 0; // above the lower edge of the last bin in bins_
};

// Search for the clip

// Nonzero magnitudes.
struct Magnitudes {
  double count, largest;
  double start; // clip to start from, below the largest
};

// Number of magnitudes m above a clip s, and the sum of m - s over them.
struct Above {
  double count, excess;
};

// The clip at which h changes its sign, which is the fixed point of Eq. 6 if it has one. Where Eq. 6 alternates, as
// around a magnitude that many elements share, bisection is used instead.
template <class Function> double fixed_point(const Magnitudes &all, double noise, const Function &above) {
  double low = 0, high = all.largest, clip = all.start;
  for (int updates = 1; high - low > kTolerance * high; updates++) {
    const auto [count, excess] = above(clip);
    const double next = (excess + count * clip) / (noise * (all.count - count) + count);
    if (std::fabs(next - clip) <= kTolerance * clip)
      return next;
    (next > clip ? low : high) = clip;
    clip = low < next && next < high && updates <= kUpdates ? next : (low + high) / 2;
  }
  return high;
}

// Search of mse.py.
struct Search {
  double lowest, highest, beyond, near, far, fine;
};

// The candidate clip with the lowest error. `measure(clips, count, errors)` computes errors up to a constant.
template <class Function>
double lowest_error(const Magnitudes &all, double octav, int levels, const Search &search, const Function &measure) {
  double clips[kMostClips], errors[kMostClips];
  const auto best_of = [&](int count) {
    measure(clips, count, errors);
    return static_cast<int>(std::min_element(errors, errors + count) - errors);
  };
  const double top = all.largest * levels / (levels - 1), first = search.lowest * octav;
  const double last = std::max(std::min(search.highest * octav, search.beyond * top), 1.02 * octav);
  const double near_step = std::log2(last / first) / (search.near - 1), far_step = std::log2(top / last) / search.far;
  int count = 0;
  for (int k = 0; k < search.near; k++)
    clips[count++] = first * std::exp2(near_step * k);
  for (int k = 1; k <= search.far && far_step > 0; k++)
    clips[count++] = last * std::exp2(far_step * k);
  const int index = best_of(count);
  const double clip = clips[index], error = errors[index];
  const double step = index < search.near ? near_step : std::max(far_step, near_step);
  for (count = 0; count < search.fine; count++)
    clips[count] = clip * std::exp2(step * (2 * (count + 1) / (search.fine + 1) - 1));
  const int finer = best_of(count);
  return errors[finer] < error ? clips[finer] : clip;
}

// OCTAV's clip, or with `search` the clip with the lowest error; NaN if a value is not finite.
float clip_of_table(const Table &table, const Grid &grid, const Search *search) {
  for (int64_t bin = kNotFinite; bin <= table.last; bin++)
    if (table.counts[bin] != 0 || table.counts[kBins + bin] != 0)
      return NAN;
  std::vector<Tail> tails{{table, 0}};
  if (grid.is_signed)
    tails.emplace_back(table, kBins);
  Magnitudes all{0, 0, 0};
  for (const Tail &tail : tails)
    all = {all.count + tail.nonzero(), std::max(all.largest, tail.top()), 0};
  all.start = all.largest / 2;
  double clip = fixed_point(all, grid.noise, [&](double clip) {
    Above sum{0, 0};
    for (Tail &tail : tails) {
      const Bin &bin = tail.at(clip);
      sum = {sum.count + bin.count(clip), sum.excess + bin.excess(clip)};
    }
    return sum;
  });
  if (search != nullptr && clip > 0)
    clip = lowest_error(all, clip, grid.levels, *search, [&](const double *clips, int count, double *errors) {
      for (int k = 0; k < count; k++) {
        const double step = clips[k] / grid.levels;
        double total = 0;
        int highest = grid.levels - 1; // positive values; negative values have one level more
        for (Tail &tail : tails) {
          for (int level = 1; level <= highest; level++)
            total += tail.at((level - 0.5) * step).excess((level - 0.5) * step);
          highest = grid.levels;
        }
        errors[k] = -step * total; // half of (error - sum of squares)
      }
    });
  return static_cast<float>(std::min<double>(clip, FLT_MAX));
}

// As clip_of_table, for the n values of a row; `values` is a buffer for them.
template <class T> float clip_of_short_row(const T *x, int64_t n, const Grid &grid, const Search *search, float *values) {
  const float least = grid.is_signed ? -INFINITY : 0;
  float sum = 0, largest = 0, unit = 1;
  uint32_t highest = 0;
  int32_t nonzero = 0;
#pragma omp simd reduction(+ : sum, nonzero) reduction(max : largest, highest)
  for (int64_t i = 0; i < n; i++) {
    const float x_i = to_float(x[i]), value = x_i > least ? x_i : least, magnitude = std::fabs(value);
    highest = std::max(highest, bits_of(x_i) & 0x7fffffff);
    largest = std::max(largest, magnitude);
    sum += magnitude;
    nonzero += value != 0 ? 1 : 0;
    values[i] = value;
  }
  if (highest >= 0x7f800000)
    return NAN;
  if (largest > 0x1p60f || largest < 0x1p-60f) { // keep sums and squares from overflow and underflow
    unit = largest > 1 ? 0x1p100f : 0x1p-100f;
    for (int64_t i = 0; i < n; i++)
      values[i] /= unit;
  }
  const double start = grid.start * (sum / unit) / std::max(nonzero, 1);
  const Magnitudes all{static_cast<double>(nonzero), largest / unit, std::min(start, 0.999 * (largest / unit))};
  double clip = fixed_point(all, grid.noise, [=](double clip) {
    const float threshold = static_cast<float>(clip);
    float excess = 0;
    int32_t count = 0;
#pragma omp simd reduction(+ : excess, count)
    for (int64_t i = 0; i < n; i++) {
      const float beyond = std::fabs(values[i]) - threshold;
      excess += beyond > 0 ? beyond : 0;
      count += beyond > 0 ? 1 : 0;
    }
    return Above{static_cast<double>(count), excess};
  });
  const float levels = grid.levels, lowest_level = grid.is_signed ? -levels : 0;
  const auto squared_error = [=](float value, float inverse_step) { // in units of the step
    const float t = value * inverse_step, above = t < lowest_level ? lowest_level : t;
    const float error = t - std::rint(above > levels - 1 ? levels - 1 : above);
    return error * error;
  };
  if (search != nullptr && clip > 0)
    clip = lowest_error(all, clip, grid.levels, *search, [=](const double *clips, int count, double *errors) {
      for (int k = 0; k < count; k += 4) { // four independent sums hide the latency of an addition
        const float inverse_a = levels / clips[k], inverse_b = levels / clips[k + 1];
        const float inverse_c = levels / clips[k + 2], inverse_d = levels / clips[k + 3];
        float a = 0, b = 0, c = 0, d = 0;
#pragma omp simd reduction(+ : a, b, c, d)
        for (int64_t i = 0; i < n; i++) {
          a += squared_error(values[i], inverse_a);
          b += squared_error(values[i], inverse_b);
          c += squared_error(values[i], inverse_c);
          d += squared_error(values[i], inverse_d);
        }
        const float sums[] = {a, b, c, d};
        for (int j = 0; j < 4; j++)
          errors[k + j] = clips[k + j] * clips[k + j] * sums[j];
      }
    });
  return static_cast<float>(std::min<double>(clip * unit, FLT_MAX));
}

template <class T> float clip_of_long_row(const T *x, int64_t n, const Grid &grid, const Search *search, int64_t threads) {
  static thread_local std::vector<int64_t> memory(4 * kBins); // all zero between calls
  Table table{memory.data(), memory.data() + 2 * kBins};
  count(x, n, threads, table);
  const float clip = clip_of_table(table, grid, search);
  for (int64_t *part = memory.data(); part < memory.data() + 4 * kBins; part += kBins)
    for (int64_t bin = 0; bin <= table.last; bin = std::max(bin + 1, table.first))
      part[bin] = 0;
  return clip;
}

template <class T>
void clips_of_rows(const T *x, int64_t rows, int64_t n, bool by_table, const Grid &grid, const Search *search,
                   int64_t threads, float *clips) {
  if (by_table && rows < threads) { // the threads share each row; nested parallel regions would start new threads
    for (int64_t row = 0; row < rows; row++)
      clips[row] = clip_of_long_row(x + row * n, n, grid, search, threads);
    return;
  }
#pragma omp parallel num_threads(threads) if (threads > 1 && rows * n >= kParallel)
  {
    static thread_local std::vector<float> buffer;
    buffer.resize(by_table ? 0 : n);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++)
      clips[row] = by_table ? clip_of_long_row(x + row * n, n, grid, search, 1)
                            : clip_of_short_row(x + row * n, n, grid, search, buffer.data());
  }
}

template <class T> bool has_negative(const T *x, int64_t n) {
  uint32_t found = 0;
  for (int64_t begin = 0; begin < n && found == 0; begin += kPiece) {
#pragma omp simd reduction(| : found)
    for (int64_t i = begin; i < std::min(n, begin + kPiece); i++)
      found |= to_float(x[i]) < 0 ? 1 : 0;
  }
  return found != 0;
}

// Call a function with x cast to its dtype: 0 is float32, 1 bfloat16, 2 float16.
template <class Function> void with_type(const void *x, int64_t dtype, const Function &function) {
  if (dtype == 0)
    function(static_cast<const float *>(x));
  else if (dtype == 1)
    function(static_cast<const Bfloat16 *>(x));
  else
    function(static_cast<const _Float16 *>(x));
}

} // namespace

// The C interface. All arguments have 64 bits. x is contiguous; `search` may be null.

extern "C" void has_negative(const void *x, int64_t dtype, int64_t n, bool *found) {
  with_type(x, dtype, [=](auto values) { *found = has_negative(values, n); });
}

// Count the values of x in a table, int64 [2, 2, kBins].
extern "C" void magnitude_table(const void *x, int64_t dtype, int64_t n, int64_t threads, int64_t *table) {
  Table to{table, table + 2 * kBins};
  with_type(x, dtype, [&](auto values) { count(values, n, threads, to); });
}

extern "C" void clip_of_table(int64_t *table, int64_t num_bits, const bool *is_signed, const void *search, float *clip) {
  const Grid grid{num_bits, *is_signed};
  const Table all{table, table + 2 * kBins, 1, kBins - 1};
  *clip = clip_of_table(all, grid, static_cast<const Search *>(search));
}

// The clips of rows of n > 0 elements; NaN for rows with NaN or Inf. Returns whether there is no such row.
extern "C" bool clips_of_rows(const void *x, int64_t dtype, int64_t rows, int64_t n, int64_t by_table, int64_t num_bits,
                              const bool *is_signed, const void *search, int64_t threads, float *clips) {
  const Grid grid{num_bits, *is_signed};
  with_type(x, dtype, [=](auto values) {
    clips_of_rows(values, rows, n, by_table, grid, static_cast<const Search *>(search), threads, clips);
  });
  return std::none_of(clips, clips + rows, [](float clip) { return std::isnan(clip); });
}
