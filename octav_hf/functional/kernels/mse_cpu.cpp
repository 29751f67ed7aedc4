// The clip of the lowest measured error on a CPU, from OCTAV's clip on; compiled behind octav_cpu.cpp.
//
// In units of its step a value inside the grid has the error t - round(t), a cheap sum over all of them; those near the
// ends of the grid or beyond, which are few, are set aside, and corrected by what clipping makes of them. A large tensor
// is measured on all outliers that the recursion has set aside and on a sample of the others: these differ from their
// levels by half a step at most, unlike the outliers, so that a sample tells their error. A short row is measured on all
// that it has, but for fewer clips, as there are many of them.

namespace {

constexpr int64_t kWhole = 1 << 14;       // elements of a short row, of which each candidate is measured on all,
constexpr int64_t kShare = 16;            // and of a larger tensor on one in so many,
constexpr int64_t kMostSampled = 1 << 18; // but no more
constexpr int kAtOnce = 8;                // candidates, at most
constexpr int kCoarse = 7, kFine = 4, kStages = 2;
constexpr int kMostSteps = 8; // from the coarse candidates up to the largest magnitude,
constexpr double kStep = 1.5; // by this factor, or by more if there are not enough
constexpr double kBetweenSteps[kFine] = {-0.5, -0.25, 0.25, 0.5}; // then between two of those, in steps
constexpr float kLowest = 0.87f; // no candidate is lower than this share of the lowest coarse one

// Short rows of 4 bits and more have other coarse candidates, and finer ones only where the best is the highest of them
// or above it. For fewer bits the lowest error is harder to find.
constexpr int kLeastBitsOfRow = 4, kCoarseOfRow = 3;
constexpr float kFactorsOfRow[][kCoarseOfRow] = {
    {1.02f, 1.08f, 1.14f}, {1.0f, 1.04f, 1.08f}, {1.0f, 1.03f, 1.06f}, {1.0f, 1.015f, 1.03f}, {1.0f, 1.02f, 1.04f}};
constexpr float kHigherOfRow[kFine] = {1.03f, 1.07f, 1.12f, 1.2f}; // in units of the highest

// t - round(t)
inline Floats rest_of_rounding(Floats t) {
#ifdef __AVX512DQ__
  return reinterpret_cast<Floats>(_mm512_reduce_ps(reinterpret_cast<__m512>(t), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  return t - rounded(t);
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

// Some clips, and the sums of squared errors that they give, in units of their steps, of so few values at a time that
// float32 sums can bear them.
template <bool kSigned, int K> struct Candidates {
  Floats inverse[K]; // steps
  Floats low, high;  // levels
  double squared_steps[K];

  Candidates(const float *clips, int num_bits) {
    const float levels = levels_above_zero(kSigned, num_bits) + 1;
    low = broadcast(kSigned ? -levels : 0);
    high = broadcast(levels - 1);
    for (int k = 0; k < K; k++) {
      const float step = clips[k] / levels;
      squared_steps[k] = static_cast<double>(step) * step;
      inverse[k] = broadcast(1 / step);
    }
  }

  // Of n values, as if no level were the last.
  void add_rounding(const float *values, int64_t n, Floats *sums) const {
    add(values, n, sums, [this](Floats x, int k) { return rest_of_rounding(x * inverse[k]); });
  }

  // The whole error of n values.
  void add_errors(const float *values, int64_t n, Floats *sums) const {
    add(values, n, sums, [this](Floats x, int k) {
      const Floats t = x * inverse[k];
      return t - rounded(clamp(t, low, high));
    });
  }

  // What clipping adds to the errors of rounding, for n values that have a vector of zeros behind them.
  void add_clipping(const float *values, int64_t n, Floats *sums) const {
    n = (n + kLanes - 1) / kLanes * kLanes; // zeros have no error
    Floats rounding[K] = {}, errors[K] = {};
    add_rounding(values, n, rounding);
    add_errors(values, n, errors);
    for (int k = 0; k < K; k++)
      sums[k] += errors[k] - rounding[k];
  }

private:
  template <class Error> static void add(const float *values, int64_t n, Floats *sums, const Error &error) {
    const auto take = [&](Floats values) {
      const Floats x = kSigned ? values : magnitude<false>(values); // a negative one has the same error for every clip
#pragma GCC unroll 8
      for (int k = 0; k < K; k++)
        sums[k] = plus_square(sums[k], error(x, k));
    };
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
      take(load(values + i));
    if (i < n)
      take(load_rest(values + i, n - i));
  }
};

// A short row, all of which is measured.
struct Row {
  const float *values;
  int64_t count;
  const Outliers *ends; // those near the ends of the grid or beyond, or null: not known

  template <bool kSigned, int K> void measure(const Candidates<kSigned, K> &candidates, double *errors) const {
    Floats sums[K] = {};
    if (ends) {
      candidates.add_rounding(values, count, sums);
      candidates.add_clipping(ends->room.data(), ends->count, sums);
    } else {
      candidates.add_errors(values, count, sums);
    }
    for (int k = 0; k < K; k++)
      errors[k] = candidates.squared_steps[k] * sum_of_lanes(sums[k]);
  }
};

// What is measured of a larger tensor.
struct Sample {
  std::vector<float> values;          // inside the grid, most of them
  double weight = 1;                  // elements that each stands for
  Outliers ends;                      // those near the ends of the grid or beyond
  const Outliers *outliers = nullptr; // not among the values
  int threads = 1;

  template <bool kSigned, int K> void measure(const Candidates<kSigned, K> &candidates, double *errors) const {
    const auto pieces_of = [](int64_t n) { return (n + kPiece - 1) / kPiece; };
    const int64_t count = values.size(), body = pieces_of(count), all = body + pieces_of(outliers->count);
    const auto add = [&](int64_t piece, double *errors) {
      Floats sums[K] = {};
      const auto size = [](int64_t n, int64_t begin) { return std::min(kPiece, n - begin); };
      if (piece < body) {
        const int64_t begin = piece * kPiece;
        candidates.add_rounding(values.data() + begin, size(count, begin), sums);
        if (begin < ends.count) // no more than the values
          candidates.add_clipping(ends.room.data() + begin, size(ends.count, begin), sums);
      } else {
        const int64_t begin = (piece - body) * kPiece;
        candidates.add_errors(outliers->room.data() + begin, size(outliers->count, begin), sums);
      }
      for (int k = 0; k < K; k++)
        errors[k] += sum_of_lanes(sums[k]);
    };
    double sums[2][K] = {};
    if (threads == 1 || all < 4 * threads) {
      for (int64_t piece = 0; piece < all; piece++)
        add(piece, sums[piece >= body]);
    } else {
      // Added up in the order of pieces, whichever thread is done first.
      std::vector<double> of_pieces(all * K);
#pragma omp parallel for num_threads(threads) schedule(static)
      for (int64_t piece = 0; piece < all; piece++)
        add(piece, &of_pieces[piece * K]);
      for (int64_t i = 0; i < all * K; i++)
        sums[i / K >= body][i % K] += of_pieces[i];
    }
    for (int k = 0; k < K; k++)
      errors[k] = candidates.squared_steps[k] * (weight * sums[0][k] + sums[1][k]);
  }
};

// The best of the candidates so far.
template <bool kSigned, class From> struct Search {
  const From &from;
  int num_bits;
  float best = 0;
  double lowest = INFINITY;

  // OCTAV's clip times the factors, and clips from there up to the top. Returns the step between those, or 0 if there
  // are none or the best is not above the factors' last.
  double coarse(float octav, float top, const float *factors, int count) {
    float clips[kCoarse + kMostSteps];
    for (int k = 0; k < count; k++)
      clips[k] = octav * factors[k];
    const float last = clips[count - 1], ratio = top / last;
    int steps = ratio > 1;
    double step = ratio;
    if (ratio > kStep) {
      steps = std::min<int>(kMostSteps, std::ceil(std::log(ratio) / std::log(kStep)));
      step = std::pow(ratio, 1.0 / steps);
    }
    for (int k = 1; k < steps; k++)
      clips[count++] = static_cast<float>(last * std::pow(step, k));
    clips[count++] = top;
    choose(clips, count);
    return best > last ? step : 0;
  }

  // Between two of the steps where they are wide, then closer and closer to the best.
  void fine(double step, const float *factors) {
    float clips[kFine];
    if (step > kStep) {
      for (int k = 0; k < kFine; k++)
        clips[k] = static_cast<float>(best * std::pow(step, kBetweenSteps[k]));
      choose(clips, kFine);
    }
    for (int stage = 0; stage < kStages; stage++)
      times(factors + stage * kFine);
  }

  // The best so far times kFine factors.
  void times(const float *factors) {
    float clips[kFine];
    for (int k = 0; k < kFine; k++)
      clips[k] = best * factors[k];
    choose(clips, kFine);
  }

private:
  void choose(const float *clips, int count) {
    for (; count > kAtOnce / 2; clips += kAtOnce, count -= kAtOnce)
      choose_at_once<kAtOnce>(clips, count);
    if (count > 0)
      choose_at_once<kAtOnce / 2>(clips, count);
  }

  // Among the first of at most K, or more, clips.
  template <int K> void choose_at_once(const float *clips, int count) {
    float some[K];
    double errors[K];
    for (int k = 0; k < K; k++)
      some[k] = clips[std::min(k, count - 1)];
    from.measure(Candidates<kSigned, K>(some, num_bits), errors);
    for (int k = 0; k < K; k++) {
      const bool is_lower = errors[k] < lowest; // no branch: there is nothing to predict
      lowest = is_lower ? errors[k] : lowest;
      best = is_lower ? some[k] : best;
    }
  }
};

// From the fixed point to the candidate with the lowest error.
struct LowestError {
  const float *coarse; // [kCoarse], candidates in units of OCTAV's clip
  const float *fine;   // [kStages][kFine], then in units of the best one so far

  template <class T, bool kSigned>
  float operator()(const Elements<T, kSigned> &elements, const Grid &grid, float octav, const Outliers &outliers) const {
    const float levels = levels_above_zero(kSigned, grid.num_bits) + 1;
    if (!(octav > 0) || !std::isnormal(1 / (octav / levels))) // subnormal, or no fixed point
      return octav;
    const float top = largest_of(outliers) * (levels / (levels - 1)); // with the largest magnitude as highest level
    if (elements.size() <= kWhole)
      return of_short_row(elements, grid, octav, top, outliers);
    static thread_local Sample sample;
    sample.threads = elements.threads();
    gather(elements, outliers, kLowest * std::min(top, octav * coarse[0]) * ((levels - 1) / levels), sample);
    Search<kSigned, Sample> search{sample, grid.num_bits};
    search.fine(search.coarse(octav, top, coarse, kCoarse), fine);
    return search.best;
  }

private:
  template <class T, bool kSigned>
  float of_short_row(const Elements<T, kSigned> &elements, const Grid &grid, float octav, float top,
                     const Outliers &outliers) const {
    const bool few_bits = grid.num_bits < kLeastBitsOfRow;
    const float *const factors = few_bits ? coarse : kFactorsOfRow[grid.num_bits - kLeastBitsOfRow];
    const int count = few_bits ? kCoarse : kCoarseOfRow;
    const float highest = octav * factors[count - 1], lowest = std::min({top, octav * factors[0], kLowest * highest});
    const float levels = levels_above_zero(kSigned, grid.num_bits) + 1;
    const bool known = !few_bits && outliers.threshold <= lowest * ((levels - 1) / levels);
    float buffer[kWhole];
    const float *const values = as_floats(elements.data(), elements.size(), buffer);
    const Row row{values, elements.size(), known ? &outliers : nullptr};
    Search<kSigned, Row> search{row, grid.num_bits};
    const double step = search.coarse(octav, top, factors, count);
    if (few_bits || step > 0)
      search.fine(step, fine);
    else if (search.best == highest)
      search.times(kHigherOfRow);
    return search.best;
  }

  static float largest_of(const Outliers &outliers) {
    Integers highest = {};
    for (int64_t i = 0; i < outliers.count; i += kLanes) { // zeros behind them
      const Integers bits = magnitude_bits(load(outliers.room.data() + i));
      highest = bits > highest ? bits : highest;
    }
    return from_bits(static_cast<uint32_t>(highest_lane(highest)));
  }

  template <class T, bool kSigned>
  static void gather(const Elements<T, kSigned> &elements, const Outliers &outliers, float cut, Sample &sample) {
    draw(elements.data(), elements.size(), kSigned, outliers.threshold, sample);
    sample.outliers = &outliers;
    // Where the outliers hold all that is above, the sample, which is without them, has none.
    const int64_t size = outliers.threshold <= cut ? 0 : sample.values.size();
    sample.ends.count = 0;
    float *const begin = sample.ends.space_for(size);
    sample.ends.count = set_aside<kSigned>(sample.values.data(), size, cut, begin) - begin;
    sample.ends.pad();
  }

  // One vector of each of so many blocks, at a place that no period of the data follows; zeros for the outliers.
  template <class T> static void draw(const T *x, int64_t n, bool is_signed, float threshold, Sample &sample) {
    const int64_t vectors = n / kLanes;
    const int64_t sampled = std::max(kWhole, std::min(n / kShare, kMostSampled)) / kLanes;
    sample.values.resize(sampled * kLanes);
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
      std::memcpy(sample.values.data() + block * kLanes, &values, sizeof values);
    }
    sample.weight = static_cast<double>(n) / sample.values.size();
  }
};

} // namespace

// As octav_clips, with the clips of the lowest measured error among candidates, which LowestError explains.
extern "C" void mse_clips(const void *x, int dtype, int64_t rows, int64_t n, int num_bits, int is_signed, double noise,
                          double start, int threads, float *result, const float *coarse, const float *fine) {
  clips(x, dtype, rows, n, {noise, start, num_bits}, is_signed, threads, LowestError{coarse, fine}, result);
}
