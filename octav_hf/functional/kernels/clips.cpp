// Clips on a CPU: magnitude tables, clips as functions of them, and a kernel for rows too short for a table.
//
// The formulas are those of table.py, octav.py and mse.py, which explain them. A table holds integers and is read in one
// order, and a row's sums are added up in one order, so that a clip does not depend on the number of threads.

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace {

constexpr int64_t kBins = 1 << 15;            // of each sign
constexpr int64_t kNotFinite = 255 << 7;      // the first bin of Inf and NaN
constexpr int64_t kWindow = 32 * 128;         // bins below the highest that matter
constexpr int64_t kLongRow = 1 << 15;         // elements of a row from which its clip is that of its table
constexpr int64_t kParallel = 1 << 15;        // elements for which a thread pays
constexpr int64_t kMostPacked = 1 << 23;      // values that a packed table can count
constexpr uint64_t kPackedValue = 1ull << 40; // one of them, to which its rest is added
constexpr int64_t kPiece = 4096;              // elements converted at a time
constexpr int64_t kBlock = 16;                // rows that are solved at a time, for the same reason,
constexpr int64_t kBlockNumel = 1 << 14;      // of no more elements, so that they stay in cache
constexpr int kHalvings = 30;                 // of a bin, to the precision of the clip
constexpr int kUpdates = 12;                  // of Eq. 6 before bisection
constexpr double kTolerance = 1e-7;           // relative, of the fixed point

struct Bfloat16 {
  uint16_t bits;
};

float to_float(float x) { return x; }
float to_float(_Float16 x) { return static_cast<float>(x); }
float to_float(Bfloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

struct Grid {
  int num_bits;
  bool is_signed;
  double noise() const { return std::pow(4.0, -num_bits) / (is_signed ? 3 : 12); } // c, the noise factor of Eq. 4
  int levels() const { return 1 << (num_bits - is_signed); }                       // steps in a clip
};

// Counting

// Counts and sums of rests of bins, those of values with a minus sign behind the others.
struct Table {
  int64_t *counts, *rests; // [2 * kBins]
  int64_t first, last;     // no bins but the first and these, of either sign, are filled
};

// A packed table has the count and the sum of a bin in one number, so that a value takes one addition.
struct Packed {
  std::vector<uint64_t> bins = std::vector<uint64_t>(2 * kBins); // zeros, before and after
  uint32_t lowest, highest; // bits of the magnitudes that are not zero
};

// Types that may be what floats are read as.
using Word __attribute__((may_alias)) = uint32_t;
using Half __attribute__((may_alias)) = uint16_t;

// The halves of a float32 are its rest and its bin. The additions of four values are prepared together.
void add(const float *x, int64_t n, uint64_t *bins) {
  const Half *halves = reinterpret_cast<const Half *>(x);
  int64_t i = 0;
  for (; i + 4 <= n; i += 4, halves += 8) {
    const uint64_t first = kPackedValue + halves[0], second = kPackedValue + halves[2];
    const uint64_t third = kPackedValue + halves[4], fourth = kPackedValue + halves[6];
    bins[halves[1]] += first;
    bins[halves[3]] += second;
    bins[halves[5]] += third;
    bins[halves[7]] += fourth;
  }
  for (; i < n; i++, halves += 2)
    bins[halves[1]] += kPackedValue + halves[0];
}

void add(const Bfloat16 *x, int64_t n, uint64_t *bins) {
  for (int64_t i = 0; i < n; i++)
    bins[x[i].bits] += kPackedValue;
}

// Widen the range from `lowest` to `highest` by n values, given as their bits.
template <class Bits> void widen(const Bits *x, int64_t n, uint32_t &lowest, uint32_t &highest) {
  constexpr int kShift = 32 - 8 * sizeof(Bits);
  using Value = std::conditional_t<kShift == 0, uint32_t, uint16_t>;
  Value least = -1, most = 0;
#pragma omp simd reduction(min : least) reduction(max : most)
  for (int64_t i = 0; i < n; i++) {
    const Value magnitude = x[i] & (static_cast<Value>(-1) >> 1);
    least = std::min<Value>(least, magnitude - 1); // zero becomes the largest number
    most = std::max<Value>(most, magnitude);
  }
  lowest = std::min(lowest, (static_cast<uint32_t>(least) + 1) << kShift);
  highest = std::max(highest, static_cast<uint32_t>(most) << kShift);
}

void count_piece(const float *x, int64_t n, Packed &packed) {
  widen(reinterpret_cast<const Word *>(x), n, packed.lowest, packed.highest);
  add(x, n, packed.bins.data());
}

void count_piece(const Bfloat16 *x, int64_t n, Packed &packed) {
  widen(reinterpret_cast<const Half *>(x), n, packed.lowest, packed.highest);
  add(x, n, packed.bins.data());
}

void count_piece(const _Float16 *x, int64_t n, Packed &packed) {
  float floats[kPiece];
  for (int64_t i = 0; i < n; i++)
    floats[i] = static_cast<float>(x[i]);
  count_piece(floats, n, packed);
}

// Add a packed table to a table, and leave it with zeros.
void unpack(Packed &packed, Table &table) {
  const int64_t first = packed.lowest >> 16, last = packed.highest >> 16;
  const auto move = [&](int64_t bin) {
    table.counts[bin] += static_cast<int64_t>(packed.bins[bin] / kPackedValue);
    table.rests[bin] += static_cast<int64_t>(packed.bins[bin] % kPackedValue);
    packed.bins[bin] = 0;
  };
  for (const int64_t sign : {int64_t{0}, kBins}) {
    move(sign);
    for (int64_t bin = std::max<int64_t>(first, 1); bin <= last; bin++)
      move(sign + bin);
  }
  table.first = std::min(table.first, first);
  table.last = std::max(table.last, last);
}

// Add the values of x to a table.
template <class T> void count(const T *x, int64_t n, int threads, Table &table) {
  const int64_t parts = std::clamp<int64_t>(n / kParallel, 1, threads);
#pragma omp parallel for num_threads(parts) schedule(static) if (parts > 1)
  for (int64_t part = 0; part < parts; part++) {
    static thread_local Packed packed;
    const int64_t end = n * (part + 1) / parts;
    for (int64_t begin = n * part / parts; begin < end; begin += kMostPacked) {
      packed.lowest = 0xffffffff;
      packed.highest = 0;
      for (int64_t i = begin, stop = std::min(end, begin + kMostPacked); i < stop; i += kPiece)
        count_piece(x + i, std::min(kPiece, stop - i), packed);
#pragma omp critical(octav_hf_unpack)
      unpack(packed, table);
    }
  }
}

// Clips as functions of a table

int64_t bin_of(double threshold) { return std::bit_cast<uint32_t>(static_cast<float>(threshold)) >> 16; }

double edge_of(int64_t bin) { return bin < kNotFinite ? std::bit_cast<float>(static_cast<uint32_t>(bin) << 16) : 0x1p128; }

// A bin of a table and what is in the higher ones; Bin in table.py explains it.
struct Bin {
  double edge, width, count, mean, crowded, place, count_above, excess_above;

  double excess(double threshold) const {
    const double u = place_of(threshold), rest = 1 - u;
    const double line = rest * rest * (0.5 + (mean - 0.5) * (1 + 2 * u));
    const double spread = count * std::max({line, mean - u, 0.0});
    const double point = (count - crowded) * rest * rest / 2 + crowded * std::max(place - u, 0.0);
    return excess_above + count_above * (edge + width - threshold) + width * (crowded > 0 ? point : spread);
  }

  double count_over(double threshold) const {
    const double u = place_of(threshold);
    const double spread = count * std::clamp((1 - u) * (1 + 6 * u * (mean - 0.5)), 0.0, 1.0);
    const double point = (count - crowded) * (1 - u) + crowded * (u < place);
    return count_above + (crowded > 0 ? point : spread);
  }

private:
  double place_of(double threshold) const { return std::clamp((threshold - edge) / width, 0.0, 1.0); }
};

// The bins of the magnitudes of positive values, of negative ones, or of both, from the highest filled one down.
class Tails {
public:
  Tails(const Table &table, bool positive, bool negative) : table_(table), positive_(positive), negative_(negative) {
    for (highest_ = std::min(table.last, kNotFinite - 1); highest_ > 0 && sum(table.counts, highest_) == 0;)
      highest_--;
  }

  bool empty() const { return highest_ == 0; }

  // Count of all magnitudes, zeros left out.
  double nonzero() const {
    int64_t count = 0;
    for (int64_t bin = std::max<int64_t>(table_.first, 1); bin <= highest_; bin++)
      count += sum(table_.counts, bin);
    return static_cast<double>(count);
  }

  // The highest bin for which this holds, given it and the count and excess above its lower edge.
  template <class Condition> const Bin &highest_where(const Condition &holds) {
    do
      add_next();
    while (!holds(bins_.back(), count_, excess_) && next() >= first());
    return bins_.back();
  }

  // Prepare for thresholds from this one on.
  void prepare(double threshold) {
    const int64_t lowest = std::max(first(), bin_of(threshold));
    bins_.reserve(std::max<int64_t>(highest_ - lowest + 1, 0));
    while (!empty() && next() >= lowest)
      add_next();
  }

  // sum((m - t)+) over the magnitudes m, for a threshold t.
  double excess(double threshold) const {
    const int64_t bin = bin_of(threshold);
    return bin > highest_ || bins_.empty() ? 0 : bins_[highest_ - std::max(bin, next() + 1)].excess(threshold);
  }

  // The largest magnitude, as far as the table tells.
  double top() const {
    if (bins_.empty())
      return 0;
    const Bin &last = bins_.front();
    return last.edge + last.width * (last.count > 1 ? 1 : last.mean);
  }

private:
  int64_t sum(const int64_t *values, int64_t bin) const {
    return (positive_ ? values[bin] : 0) + (negative_ ? values[kBins + bin] : 0);
  }
  int64_t first() const { return std::max<int64_t>(highest_ - kWindow + 1, 1); }
  int64_t next() const { return highest_ - static_cast<int64_t>(bins_.size()); }

  void add_next() {
    const int64_t number = next();
    const double edge = edge_of(number), width = edge_of(number + 1) - edge;
    const double count = static_cast<double>(sum(table_.counts, number));
    const double mean = static_cast<double>(sum(table_.rests, number)) / (65536 * std::max(count, 1.0));
    const double below = number > first() ? sum(table_.counts, number - 1) : count;
    const double above = number < highest_ ? bins_.back().count : 0;
    const bool alone = count == 1 || mean == 0;
    const double smooth = alone ? 0 : std::min(below, above);
    const double crowded = alone || count > 2 * (below + above) ? count - smooth : 0;
    const double place = std::clamp((count * mean - smooth / 2) / std::max(crowded, 1.0), 0.0, 1.0);
    bins_.push_back({edge, width, count, mean, crowded, place, count_, excess_});
    excess_ += width * (count * mean + count_);
    count_ += count;
  }

  const Table &table_;
  const bool positive_, negative_;
  int64_t highest_;
  std::vector<Bin> bins_;
  double count_ = 0, excess_ = 0; // above the lower edge of the last bin, what is there included
};

// Where h changes its sign; 0 if there are no magnitudes.
double fixed_point(const Table &table, const Grid &grid) {
  Tails tails(table, true, grid.is_signed);
  if (tails.empty())
    return 0;
  const double noise = grid.noise(), nonzero = tails.nonzero();
  const Bin &bin = tails.highest_where([&](const Bin &bin, double count, double excess) {
    return noise * bin.edge * (nonzero - count) < excess;
  });
  double low = bin.edge, high = bin.edge + bin.width;
  for (int i = 0; i < kHalvings; i++) {
    const double middle = (low + high) / 2;
    (noise * middle * (nonzero - bin.count_over(middle)) < bin.excess(middle) ? low : high) = middle;
  }
  return (low + high) / 2;
}

// The search of mse.py: clips near OCTAV's, from there to the top, then between the best of them and its neighbours.
struct Search {
  double lowest, highest; // of the near ones, in units of OCTAV's clip
  int near, far, fine;    // how many

  // `measure(clips, count, errors)` gives the errors up to a constant.
  template <class Measure> double best(double octav, double last, double top, const Measure &measure) const {
    double clips[kMost], errors[kMost];
    const double first = lowest * octav, near_log = std::log2(last / first) / (near - 1);
    const double far_log = std::log2(top / last) / far;
    int count = 0;
    for (; count < near; count++)
      clips[count] = first * std::exp2(near_log * count);
    for (int k = 1; k <= far && top > last; k++)
      clips[count++] = last * std::exp2(far_log * k);
    measure(clips, count, errors);
    const int index = std::min_element(errors, errors + count) - errors;
    const double best = clips[index], error = errors[index];
    const double log = index < near ? near_log : std::max(far_log, near_log);
    for (int k = 0; k < fine; k++)
      clips[k] = best * std::exp2(log * (2 * (k + 1.0) / (fine + 1) - 1));
    measure(clips, fine, errors);
    const int finer = std::min_element(errors, errors + fine) - errors;
    return errors[finer] < error ? clips[finer] : best;
  }

private:
  static constexpr int kMost = 64;
};

constexpr double kHighest[] = {8.0, 4.0, 2.6, 2.2, 2.0, 1.8, 1.8}; // by bits, as for rows
constexpr int kNearOfRow[] = {8, 8, 4, 4, 8, 8, 4};
constexpr double kLowestOfRow[] = {0.95, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98};

double lowest_error(const Table &table, const Grid &grid) {
  const double octav = fixed_point(table, grid);
  if (octav == 0)
    return 0;
  const Search search{0.85, kHighest[grid.num_bits - 2], 40, 15, 15};
  const int levels = grid.levels();
  Tails positive(table, true, false), negative(table, false, grid.is_signed);
  for (Tails *tails : {&positive, &negative})
    tails->prepare(0.9 * search.lowest * octav / levels / 2);
  const double top = std::max(positive.top(), negative.top()) * levels / (levels - 1);
  return search.best(octav, search.highest * octav, top, [&](const double *clips, int count, double *errors) {
    for (int k = 0; k < count; k++) {
      const double step = clips[k] / levels;
      double total = 0;
      for (int level = 1; level < levels; level++)
        total += positive.excess((level - 0.5) * step);
      for (int level = 1; level <= levels && grid.is_signed; level++)
        total += negative.excess((level - 0.5) * step);
      errors[k] = -step * total; // half of the error without the sum of squares
    }
  });
}

bool is_finite(const Table &table) {
  for (int64_t bin = kNotFinite; bin <= table.last; bin++)
    if (table.counts[bin] != 0 || table.counts[kBins + bin] != 0)
      return false;
  return true;
}

// Clips of short rows

// A row of float32, on an unsigned grid with zeros for negative values.
struct Row {
  float *values;
  int64_t size;
  float unit;       // of the values, a power of two that keeps sums and squares from overflowing or vanishing
  float largest;    // magnitude
  float mean;       // of the magnitudes that are not zero
  double nonzero;   // their count
  bool finite;
  double octav = 0; // the fixed point of Eq. 6; it is above `low`, not above `high`, and `clip` is the next try
  float low = 0, high, clip;
  int32_t count = -1; // above the clip before; -1 if `clip` is not its update
  int updates = 0;
};

template <bool kSigned, class T> Row read_row(const T *x, int64_t n, float *values) {
  float total = 0, largest = 0;
  uint32_t highest = 0;
  int32_t nonzero = 0;
#pragma omp simd reduction(+ : total, nonzero) reduction(max : largest, highest)
  for (int64_t i = 0; i < n; i++) {
    const float x_i = to_float(x[i]), value = kSigned || x_i > 0 ? x_i : 0;
    const uint32_t bits = std::bit_cast<uint32_t>(x_i) & 0x7fffffff;
    const float m = std::fabs(value);
    highest = bits > highest ? bits : highest;
    largest = m > largest ? m : largest;
    total += m;
    nonzero += value != 0;
    values[i] = value;
  }
  Row row{values, n, 1, largest, total / nonzero, static_cast<double>(nonzero), highest < 0x7f800000};
  if (nonzero > 0 && (largest > 0x1p60f || largest < 0x1p-60f)) {
    row.unit = largest > 1 ? 0x1p100f : 0x1p-100f;
    for (int64_t i = 0; i < n; i++)
      values[i] /= row.unit;
    row.largest /= row.unit;
    row.mean = row.largest; // from which Eq. 6 gets along as well
  }
  return row;
}

// One update of Eq. 6 of a row, or a step of bisection; whether the fixed point is found.
bool update(Row &row, double noise) {
  const float *const values = row.values;
  const float clip = row.clip;
  float total = 0;
  int32_t count = 0;
#pragma omp simd reduction(+ : total, count)
  for (int64_t i = 0; i < row.size; i++) {
    const float m = std::fabs(values[i]);
    total += m > clip ? m : 0;
    count += m > clip ? 1 : 0;
  }
  row.octav = total / (noise * (row.nonzero - count) + count);
  if (count == row.count || std::fabs(row.octav - row.clip) <= kTolerance * row.clip)
    return true;
  (row.octav > row.clip ? row.low : row.high) = row.clip;
  row.clip = static_cast<float>(row.octav);
  row.count = count;
  if (row.low < row.clip && row.clip < row.high && ++row.updates <= kUpdates)
    return false;
  // Eq. 6 jumps to and fro over a magnitude that many elements share. Where h jumps over zero there, that is the clip.
  const uint32_t low = std::bit_cast<uint32_t>(row.low), high = std::bit_cast<uint32_t>(row.high);
  row.octav = row.high;
  row.clip = std::bit_cast<float>(low + (high - low) / 2);
  row.count = -1;
  return high - low <= 1;
}

// Updates rows by turns, so that the next one's need not wait for what an update ends in.
void fixed_points(Row *rows, int count, const Grid &grid) {
  const double noise = grid.noise();
  // Nearly the fixed point of Gaussian data in units of its mean magnitude.
  const double start = (std::sqrt(-2 * std::log(noise)) - 1.05) * std::sqrt(M_PI / 2);
  Row *left[kBlock];
  int size = 0;
  for (Row *row = rows; row < rows + count; row++)
    if (row->finite && row->nonzero > 0) {
      row->high = row->largest;
      row->clip = std::min(static_cast<float>(row->mean * start), 0.999f * row->largest);
      left[size++] = row;
    }
  while (size > 0)
    size = std::remove_if(left, left + size, [&](Row *row) { return update(*row, noise); }) - left;
}

double lowest_error(const Row &row, const Grid &grid) {
  const int levels = grid.levels(), bits = grid.num_bits;
  const Search search{kLowestOfRow[bits - 2], kHighest[bits - 2], kNearOfRow[bits - 2], 4, 4};
  const double top = static_cast<double>(row.largest) * levels / (levels - 1);
  const double beyond = bits > 4 ? 1.03 * top : top;
  const double last = std::max(std::min(search.highest * row.octav, beyond), 1.02 * row.octav);
  const float low = grid.is_signed ? -levels : 0, high = levels - 1;
  const float *const values = row.values;
  const auto squared_error = [=](float x, float inverse_step) { // in units of the step
    const float t = x * inverse_step, above = t < low ? low : t, inside = above > high ? high : above;
    const float error = t - std::rint(inside);
    return error * error;
  };
  return search.best(row.octav, last, top, [&](const double *clips, int count, double *errors) {
    for (; count > 0; count -= 4, clips += 4, errors += 4) { // at a time, so that their sums do not wait for each other
      const float inverse_a = levels / clips[0], inverse_b = levels / clips[1];
      const float inverse_c = levels / clips[2], inverse_d = levels / clips[3];
      float a = 0, b = 0, c = 0, d = 0;
#pragma omp simd reduction(+ : a, b, c, d)
      for (int64_t i = 0; i < row.size; i++) {
        a += squared_error(values[i], inverse_a);
        b += squared_error(values[i], inverse_b);
        c += squared_error(values[i], inverse_c);
        d += squared_error(values[i], inverse_d);
      }
      const float sums[] = {a, b, c, d};
      for (int k = 0; k < 4; k++)
        errors[k] = (clips[k] / levels) * (clips[k] / levels) * sums[k];
    }
  });
}

// Rows of any length

enum Rule { kOctav, kMse };

float clip_of(const Table &table, const Grid &grid, Rule rule) {
  if (!is_finite(table))
    return NAN;
  return static_cast<float>(std::min<double>(rule == kMse ? lowest_error(table, grid) : fixed_point(table, grid), FLT_MAX));
}

template <class T> float clip_of_long_row(const T *x, int64_t n, const Grid &grid, Rule rule, int threads) {
  static thread_local std::vector<int64_t> memory(4 * kBins); // zeros, before and after
  Table table{memory.data(), memory.data() + 2 * kBins, kBins, 0};
  count(x, n, threads, table);
  const float clip = clip_of(table, grid, rule);
  for (int64_t *part = memory.data(); part < memory.data() + 4 * kBins; part += kBins) {
    part[0] = 0;
    std::fill(part + std::min(table.first, table.last), part + table.last + 1, 0);
  }
  return clip;
}

template <class T>
void clips_of_long_rows(const T *x, int64_t rows, int64_t n, const Grid &grid, Rule rule, int threads, float *clips) {
  if (rows < threads || threads == 1) { // which share each row
    for (int64_t row = 0; row < rows; row++)
      clips[row] = clip_of_long_row(x + row * n, n, grid, rule, threads);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; row++)
    clips[row] = clip_of_long_row(x + row * n, n, grid, rule, 1);
}

template <class T>
void clips_of_short_rows(const T *x, int64_t rows, int64_t n, const Grid &grid, Rule rule, int threads, float *clips) {
  const int64_t block = std::clamp<int64_t>(kBlockNumel / n, 1, kBlock);
  const int64_t blocks = (rows + block - 1) / block;
#pragma omp parallel num_threads(threads) if (threads > 1 && blocks > 1 && rows * n >= kParallel)
  {
    static thread_local std::vector<float> buffer;
    buffer.resize(std::max<size_t>(buffer.size(), block * n));
#pragma omp for schedule(static)
    for (int64_t begin = 0; begin < rows; begin += block) {
      const int count = static_cast<int>(std::min(block, rows - begin));
      Row some[kBlock];
      for (int k = 0; k < count; k++) {
        float *const values = buffer.data() + k * n;
        const T *const from = x + (begin + k) * n;
        some[k] = grid.is_signed ? read_row<true>(from, n, values) : read_row<false>(from, n, values);
      }
      fixed_points(some, count, grid);
      for (int k = 0; k < count; k++) {
        const Row &row = some[k];
        const double clip = rule == kMse && row.octav > 0 ? lowest_error(row, grid) : row.octav;
        clips[begin + k] = row.finite ? static_cast<float>(std::min<double>(clip * row.unit, FLT_MAX)) : NAN;
      }
    }
  }
}

template <class T>
bool clips_of_rows(const void *x, int64_t rows, int64_t n, const Grid &grid, Rule rule, int threads, float *clips) {
  const auto clips_of_these = n < kLongRow ? clips_of_short_rows<T> : clips_of_long_rows<T>;
  clips_of_these(static_cast<const T *>(x), rows, n, grid, rule, threads, clips);
  return std::none_of(clips, clips + rows, [](float clip) { return std::isnan(clip); });
}

// Whether one of n numbers, given as bits of a float with this sign, is below zero and not NaN.
template <class Bits> bool has_negative(const Bits *x, int64_t n, Bits sign, Bits infinity) {
  for (int64_t begin = 0; begin < n; begin += kPiece) {
    const int64_t end = std::min(n, begin + kPiece);
    Bits found = 0;
#pragma omp simd reduction(| : found)
    for (int64_t i = begin; i < end; i++)
      found = std::max<Bits>(found, static_cast<Bits>(x[i] - sign - 1) < infinity ? 1 : 0);
    if (found)
      return true;
  }
  return false;
}

} // namespace

// dtype: 0 float32, 1 bfloat16, 2 float16; x is contiguous.
extern "C" bool has_negative(const void *x, int dtype, int64_t n) {
  if (dtype == 0)
    return has_negative<uint32_t>(static_cast<const uint32_t *>(x), n, 0x80000000u, 0x7f800000u);
  return has_negative<uint16_t>(static_cast<const uint16_t *>(x), n, 0x8000u, dtype == 1 ? 0x7f80u : 0x7c00u);
}

// Add to a table, int64 [2, 2, bins].
extern "C" void magnitude_table(const void *x, int dtype, int64_t n, int threads, void *table) {
  Table to{static_cast<int64_t *>(table), static_cast<int64_t *>(table) + 2 * kBins, kBins, 0};
  if (dtype == 0)
    count(static_cast<const float *>(x), n, threads, to);
  else if (dtype == 1)
    count(static_cast<const Bfloat16 *>(x), n, threads, to);
  else
    count(static_cast<const _Float16 *>(x), n, threads, to);
}

extern "C" void clip_of_table(void *table, int num_bits, const bool *is_signed, int rule, float *clip) {
  int64_t *const counts = static_cast<int64_t *>(table);
  *clip = clip_of({counts, counts + 2 * kBins, 1, kBins - 1}, {num_bits, *is_signed}, static_cast<Rule>(rule));
}

// The clips of contiguous rows of n > 0 elements, NaN for rows that are not finite; whether all are.
extern "C" bool clips_of_rows(const void *x, int dtype, int64_t rows, int64_t n, int num_bits, const bool *is_signed,
                              int rule, int threads, float *clips) {
  const auto clips_of_these = dtype == 0 ? clips_of_rows<float> : dtype == 1 ? clips_of_rows<Bfloat16> : clips_of_rows<_Float16>;
  return clips_of_these(x, rows, n, {num_bits, *is_signed}, static_cast<Rule>(rule), threads, clips);
}
