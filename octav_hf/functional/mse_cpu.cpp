// The clip of the lowest measured error on a CPU, from OCTAV's clip on; compiled behind octav_cpu.cpp.
//
// In units of its step a value inside the grid has the error t - round(t), a cheap sum over all of them; those near the
// ends of the grid or beyond, which are few, are set aside, and corrected by what clipping makes of them. A large tensor
// is measured on all outliers that the recursion has set aside and on a sample of the others: these differ from their
// levels by half a step at most, unlike the outliers, so that a sample tells their error.

namespace {

constexpr int64_t kShortRow = 1 << 11;    // elements up to which few candidates are measured,
constexpr int64_t kWhole = 1 << 14;       // and up to which each is measured on all elements
constexpr int64_t kShare = 8;             // else one in so many,
constexpr int64_t kMostSampled = 1 << 18; // but no more
constexpr int kAtOnce = 4;                // candidates
constexpr int kCoarse = 7, kFine = 4, kStages = 2;
constexpr int kMostSteps = 8; // from the coarse candidates up to the largest magnitude,
constexpr double kStep = 1.5; // by this factor, or by more if there are not enough
constexpr double kBetweenSteps[kFine] = {-0.5, -0.25, 0.25, 0.5}; // then between two of those, in steps
// Fewer for short rows, of which there are many, of 4 bits and more: for fewer bits the lowest error is harder to find.
constexpr int kCoarseOfRow = 3, kLeastBitsOfRow = 4;
constexpr float kCoarseFactorsOfRow[][kCoarseOfRow] = {
    {1.0f, 1.08f, 1.2f}, {1.0f, 1.06f, 1.16f}, {1.0f, 1.04f, 1.12f}, {1.0f, 1.03f, 1.08f}, {1.0f, 1.02f, 1.05f}};
constexpr float kFineFactorsOfRow[kFine] = {0.93f, 0.97f, 1.03f, 1.08f};

// No candidate is lower than this share of the lowest coarse one.
constexpr float kLowest = 0.87f;

inline float levels_above_zero(bool is_signed, int num_bits) {
  return static_cast<float>((1 << (num_bits - (is_signed ? 1 : 0))) - 1);
}

inline Floats broadcast(float value) { return value - Floats{}; }

// t - round(t)
inline Floats rest_of_rounding(Floats t) {
#ifdef __AVX512DQ__
  return reinterpret_cast<Floats>(_mm512_reduce_ps(reinterpret_cast<__m512>(t), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  return t - ((t + 12582912.0f) - 12582912.0f); // 1.5 * 2^23: what is larger by far is no value inside a grid
#endif
}

// sum + t^2
inline Floats plus_square(Floats sum, Floats t) {
#ifdef __AVX512F__
  return reinterpret_cast<Floats>(
      _mm512_fmadd_ps(reinterpret_cast<__m512>(t), reinterpret_cast<__m512>(t), reinterpret_cast<__m512>(sum)));
#else
  return sum + t * t;
#endif
}

inline Floats clamp(Floats t, Floats low, Floats high) {
#ifdef __AVX512F__
  return reinterpret_cast<Floats>(_mm512_min_ps(
      _mm512_max_ps(reinterpret_cast<__m512>(t), reinterpret_cast<__m512>(low)), reinterpret_cast<__m512>(high)));
#else
  t = t < low ? low : t;
  return t > high ? high : t;
#endif
}

// Some clips, and the sums of squared errors that they give, in units of their steps.
template <bool kSigned> struct Candidates {
  static constexpr int K = kAtOnce;
  float clips[K];
  Floats inverse[K]; // steps
  Floats low, high;  // levels
  double squared_steps[K];

  Candidates(const float *from, int num_bits) {
    const float levels = levels_above_zero(kSigned, num_bits) + 1;
    low = broadcast(kSigned ? -levels : 0);
    high = broadcast(levels - 1);
    for (int k = 0; k < K; k++) {
      clips[k] = from[k];
      const float step = clips[k] / levels;
      squared_steps[k] = static_cast<double>(step) * step;
      inverse[k] = broadcast(1 / step);
    }
  }

  // Of n values, at most a piece, as if no level were the last.
  void add_rounding(const float *values, int64_t n, double *errors) const {
    Floats sums[K] = {};
    const auto take = [&](Floats values) {
      const Floats x = kSigned ? values : magnitude<false>(values); // a negative one has the same error for every clip
#pragma GCC unroll 4
      for (int k = 0; k < K; k++)
        sums[k] = plus_square(sums[k], rest_of_rounding(x * inverse[k]));
    };
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
      take(load(values + i));
    if (i < n)
      take(load_rest(values + i, n - i));
    for (int k = 0; k < K; k++)
      errors[k] += sum_of_lanes(sums[k]);
  }

  // Of n values, at most a piece and with a vector of zeros behind them: the whole error, or what clipping adds to that of rounding.
  template <bool kRoundingKnown> void add_clipping(const float *values, int64_t n, double *errors) const {
    Floats sums[K] = {};
    for (int64_t i = 0; i < n; i += kLanes) {
      const Floats x = load(values + i);
#pragma GCC unroll 4
      for (int k = 0; k < K; k++) {
        const Floats t = x * inverse[k], inside = clamp(t, low, high);
        const Floats error = (t - inside) + rest_of_rounding(inside); // one of the two is zero
        sums[k] = plus_square(sums[k], error);
        if (kRoundingKnown) {
          const Floats rest = rest_of_rounding(t);
          sums[k] -= rest * rest;
        }
      }
    }
    for (int k = 0; k < K; k++)
      errors[k] += sum_of_lanes(sums[k]);
  }
};

// The values that errors are measured on.
struct Measured {
  const float *values = nullptr; // inside the grid, most of them
  int64_t count = 0;
  double weight = 1;                 // elements that each stands for
  std::vector<float> room, ends;     // what `values` may point to; those near the ends of the grid or beyond
  int64_t end_count = 0;
  const float *outliers = nullptr;   // not among the values
  int64_t outlier_count = 0;

  float *ends_for(int64_t n) {
    if (static_cast<int64_t>(ends.size()) < end_count + n + kLanes)
      ends.resize(2 * end_count + n + kLanes);
    return ends.data() + end_count;
  }
};

template <bool kSigned>
void measure(const Measured &measured, const Candidates<kSigned> &candidates, int threads, double *errors) {
  constexpr int K = kAtOnce;
  const auto pieces_of = [](int64_t n) { return (n + kPiece - 1) / kPiece; };
  const int64_t body = pieces_of(measured.count), ends = pieces_of(measured.end_count);
  const int64_t all = body + ends + pieces_of(measured.outlier_count);
  const auto add = [&](int64_t piece, double *sums) {
    const auto of = [&](const float *values, int64_t n, int64_t index, auto &&function) {
      function(values + index * kPiece, std::min(kPiece, n - index * kPiece));
    };
    if (piece < body)
      of(measured.values, measured.count, piece,
         [&](const float *values, int64_t n) { candidates.add_rounding(values, n, sums); });
    else if (piece < body + ends)
      of(measured.ends.data(), measured.end_count, piece - body,
         [&](const float *values, int64_t n) { candidates.template add_clipping<true>(values, n, sums); });
    else
      of(measured.outliers, measured.outlier_count, piece - body - ends,
         [&](const float *values, int64_t n) { candidates.template add_clipping<false>(values, n, sums); });
  };
  double sums[2][K] = {};
  if (threads == 1 || all < 2 * threads) {
    for (int64_t piece = 0; piece < all; piece++)
      add(piece, sums[piece >= body + ends]);
  } else {
    // Added up in the order of pieces, whichever thread is done first.
    std::vector<double> of_pieces(all * K);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t piece = 0; piece < all; piece++)
      add(piece, &of_pieces[piece * K]);
    for (int64_t i = 0; i < all * K; i++)
      sums[i / K >= body + ends][i % K] += of_pieces[i];
  }
  for (int k = 0; k < K; k++)
    errors[k] = candidates.squared_steps[k] * (measured.weight * sums[0][k] + sums[1][k]);
}

// From the fixed point to the candidate with the lowest error.
struct LowestError {
  const float *coarse; // [kCoarse], candidates in units of OCTAV's clip
  const float *fine;   // [kStages][kFine], then in units of the best one so far

  template <class T, bool kSigned>
  float operator()(const Elements<T, kSigned> &elements, const Grid &grid, float octav, const Outliers &outliers) const {
    const float levels = levels_above_zero(kSigned, grid.num_bits) + 1;
    if (!(octav > 0) || !std::isnormal(1 / (octav / levels))) // subnormal, or no fixed point
      return octav;
    static thread_local Measured measured;
    const float top = largest_of(outliers) * (levels / (levels - 1)); // with the largest magnitude as highest level
    const bool few = elements.size() <= kShortRow && grid.num_bits >= kLeastBitsOfRow;
    const float *const factors = few ? kCoarseFactorsOfRow[grid.num_bits - kLeastBitsOfRow] : coarse;
    gather(elements, outliers, kLowest * std::min(top, octav * factors[0]) * ((levels - 1) / levels), measured);
    Search<kSigned> search{measured, grid, elements.threads()};
    return few ? search.run(octav, top, factors, kCoarseOfRow, kFineFactorsOfRow, 1)
               : search.run(octav, top, factors, kCoarse, fine, kStages);
  }

private:
  template <bool kSigned> struct Search {
    const Measured &measured;
    const Grid &grid;
    int threads;
    float best = 0;
    double lowest = INFINITY;

    float run(float octav, float top, const float *factors, int count, const float *finer, int stages) {
      float clips[kCoarse + kMostSteps];
      for (int k = 0; k < count; k++)
        clips[k] = octav * factors[k];
      const float last = clips[count - 1];
      const double gap = std::log(static_cast<double>(top) / last);
      const int steps = gap > 0 ? std::min<int>(kMostSteps, std::ceil(gap / std::log(kStep))) : 0;
      for (int k = 1; k < steps; k++)
        clips[count++] = static_cast<float>(last * std::exp(gap * k / steps));
      clips[count++] = top;
      choose(clips, count);
      if (steps && best > last && gap / steps > std::log(kStep)) {
        for (int k = 0; k < kFine; k++)
          clips[k] = static_cast<float>(best * std::exp(gap / steps * kBetweenSteps[k]));
        choose(clips, kFine);
      }
      for (int stage = 0; stage < stages; stage++) {
        for (int k = 0; k < kFine; k++)
          clips[k] = best * finer[stage * kFine + k];
        choose(clips, kFine);
      }
      return best;
    }

    void choose(const float *clips, int count) {
      for (int begin = 0; begin < count; begin += kAtOnce) {
        float some[kAtOnce];
        double errors[kAtOnce];
        for (int k = 0; k < kAtOnce; k++)
          some[k] = clips[std::min(begin + k, count - 1)];
        measure<kSigned>(measured, Candidates<kSigned>(some, grid.num_bits), threads, errors);
        for (int k = 0; k < kAtOnce; k++)
          if (errors[k] < lowest) {
            lowest = errors[k];
            best = some[k];
          }
      }
    }
  };

  static float largest_of(const Outliers &outliers) {
    Integers highest = {};
    for (int64_t i = 0; i < outliers.count; i += kLanes) { // zeros behind them
      const Integers bits = magnitude_bits(load(outliers.room.data() + i));
      highest = bits > highest ? bits : highest;
    }
    return from_bits(static_cast<uint32_t>(highest_lane(highest)));
  }

  template <class T, bool kSigned>
  static void gather(const Elements<T, kSigned> &elements, const Outliers &outliers, float cut, Measured &measured) {
    const int64_t n = elements.size();
    const T *const x = elements.data();
    measured.end_count = 0;
    if (n <= kWhole) {
      measured.room.resize(kWhole);
      measured.values = as_floats(x, n, measured.room.data());
      measured.count = n;
      measured.weight = 1;
      measured.outlier_count = 0;
    } else {
      sample(x, n, kSigned, outliers.threshold, measured);
      measured.outliers = outliers.room.data();
      measured.outlier_count = outliers.count;
    }
    float *const begin = measured.ends_for(measured.count), *end = begin;
    int64_t i = 0;
    for (; i + kLanes <= measured.count; i += kLanes)
      end = append_above<kSigned>(load(measured.values + i), cut, end);
    if (i < measured.count)
      end = append_above<kSigned>(load_rest(measured.values + i, measured.count - i), cut, end);
    measured.end_count = end - begin;
    std::fill_n(end, kLanes, 0.0f);
  }

  // One vector of each of so many blocks, at a place that no period of the data follows; zeros for the outliers.
  template <class T> static void sample(const T *x, int64_t n, bool is_signed, float threshold, Measured &measured) {
    const int64_t vectors = n / kLanes;
    const int64_t sampled = std::max(kWhole, std::min(n / kShare, kMostSampled)) / kLanes;
    measured.room.resize(sampled * kLanes);
    uint64_t random = 0x9e3779b97f4a7c15u;
    for (int64_t block = 0; block < sampled; block++) {
      const int64_t begin = vectors * block / sampled, size = vectors * (block + 1) / sampled - begin;
      random = random * 6364136223846793005u + 1442695040888963407u;
      const T *const from = x + (begin + static_cast<int64_t>((random >> 33) * size >> 31)) * kLanes;
      Floats values;
      for (int64_t lane = 0; lane < kLanes; lane++)
        values[lane] = to_float(from[lane]);
      const Floats magnitudes = is_signed ? magnitude<true>(values) : values;
      values = magnitudes > threshold ? Floats{} : values;
      std::memcpy(measured.room.data() + block * kLanes, &values, sizeof values);
    }
    measured.values = measured.room.data();
    measured.count = sampled * kLanes;
    measured.weight = static_cast<double>(n) / measured.count;
  }
};

} // namespace

// As octav_clips, with the clips of the lowest measured error among candidates, which LowestError explains.
extern "C" void mse_clips(const void *x, int dtype, int64_t rows, int64_t n, int num_bits, int is_signed, double noise,
                          double start, int threads, float *result, const float *coarse, const float *fine) {
  clips(x, dtype, rows, n, {noise, start, num_bits}, is_signed, threads, LowestError{coarse, fine}, result);
}
