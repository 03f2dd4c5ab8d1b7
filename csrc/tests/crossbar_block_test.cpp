// The ladder of a CUDA block on the CPU: every phase in a shuffled order, memory guarded, against a dense solution of the
// nodal equations in extended precision and finite differences. Build: g++ -std=c++20 -fsanitize=address,undefined
#include "../crossbar/block_ladder.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <random>
#include <vector>

using namespace pyaccel::crossbar;

namespace {

std::mt19937_64 random_bits(1);
double uniform(double low, double high) { return std::uniform_real_distribution<double>(low, high)(random_bits); }

struct ShuffledBlock {
  template <class F>
  void each(int64_t count, const F& f) {
    std::vector<int64_t> order(static_cast<size_t>(count));
    std::iota(order.begin(), order.end(), int64_t{0});
    if (shuffle) std::shuffle(order.begin(), order.end(), random_bits);
    for (const int64_t e : order) f(e);
  }
  bool shuffle = true;
};

using Matrix2 = std::vector<double>;

Matrix2 nodal(const Matrix2& g, int64_t rows, int64_t columns, const Resistances& ohm) {
  const int64_t half = rows * columns, n = 2 * half;
  std::vector<long double> a(static_cast<size_t>(n * n)), b(static_cast<size_t>(n * rows));
  const auto A = [&](int64_t i, int64_t j) -> long double& { return a[static_cast<size_t>(i * n + j)]; };
  const auto B = [&](int64_t i, int64_t j) -> long double& { return b[static_cast<size_t>(i * rows + j)]; };
  const auto resistor = [&](int64_t p, int64_t q, long double c) {
    A(p, p) += c, A(q, q) += c, A(p, q) -= c, A(q, p) -= c;
  };
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) {
      const int64_t u = i * columns + j, w = half + u;
      resistor(u, w, g[static_cast<size_t>(u)]);
      if (j > 0) resistor(u, u - 1, 1 / static_cast<long double>(ohm.wire_row));
      if (i > 0) resistor(w, w - columns, 1 / static_cast<long double>(ohm.wire_col));
    }
  for (int64_t i = 0; i < rows; ++i) A(i * columns, i * columns) += 1 / static_cast<long double>(ohm.driver);
  for (int64_t i = 0; i < rows; ++i) B(i * columns, i) = 1 / static_cast<long double>(ohm.driver);
  for (int64_t j = 0; j < columns; ++j) A(n - columns + j, n - columns + j) += 1 / static_cast<long double>(ohm.sense);
  for (int64_t p = 0; p < n; ++p)
    for (int64_t r = p + 1; r < n; ++r) {
      if (A(r, p) == 0) continue;
      const long double f = A(r, p) / A(p, p);
      for (int64_t c = p; c < n; ++c) A(r, c) -= f * A(p, c);
      for (int64_t c = 0; c < rows; ++c) B(r, c) -= f * B(p, c);
    }
  for (int64_t p = n - 1; p >= 0; --p)
    for (int64_t c = 0; c < rows; ++c) {
      for (int64_t k = p + 1; k < n; ++k) B(p, c) -= A(p, k) * B(k, c);
      B(p, c) /= A(p, p);
    }
  Matrix2 out(static_cast<size_t>(half));
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j)
      out[static_cast<size_t>(i * columns + j)] = static_cast<double>(B(n - columns + j, i) / static_cast<long double>(ohm.sense));
  return out;
}

template <class E, class F>
void with_ladder(int64_t rows, int64_t columns, const Resistances& ohm, bool gradient, bool shuffle, const F& f) {
  const TileView view = view_of({pyaccel::Dtype::f64, 1, rows, columns}, ohm);
  const BlockSizes size(view, gradient);
  std::vector<double> fast(static_cast<size_t>(size.fast), std::nan("")), bulk(static_cast<size_t>(size.bulk), std::nan(""));
  int fault = -1;
  ShuffledBlock block{shuffle};
  f(BlockLadder<ShuffledBlock, E>(block, view, size, fast.data(), bulk.data(), &fault));
}

int failures = 0;
void expect(bool good, const char* what, double value) {
  if (good) return;
  ++failures;
  std::printf("FAILED %s: %g\n", what, value);
}

void check(int64_t rows, int64_t columns, const Resistances& ohm) {
  const size_t cells = static_cast<size_t>(rows * columns);
  Matrix2 g(cells), out(cells), plain(cells), weight(cells), found(cells);
  for (auto& v : g) v = uniform(5e-6, 5e-5);
  if (cells > 3) g[cells / 2] = 0;
  for (auto& v : weight) v = uniform(-1, 1);
  const auto solve = [&](const Matrix2& cells_of, Matrix2& to, bool shuffle) {
    with_ladder<double>(rows, columns, ohm, false, shuffle, [&](const auto& ladder) { ladder.solve(cells_of.data(), to.data()); });
  };
  solve(g, out, true);
  solve(g, plain, false);
  expect(out == plain, "the order of items changes nothing", 0);
  const Matrix2 exact = nodal(g, rows, columns, ohm);
  const double largest = *std::max_element(exact.begin(), exact.end());
  double error = 0;
  for (size_t c = 0; c < cells; ++c) error = std::max(error, std::abs(out[c] - exact[c]) / largest);
  expect(error < 1e-12, "against the nodal equations", error);
  with_ladder<double>(rows, columns, ohm, true, true,
                      [&](const auto& ladder) { ladder.gradient(g.data(), weight.data(), found.data()); });
  double scale = 0, worst = 0;
  for (const double v : found) scale = std::max(scale, std::abs(v));
  for (size_t c = 0; c < cells; c += 1 + cells / 12) {
    const double step = 1e-9;  // G' is smooth on the scale of 1e-5
    Matrix2 up = g, down = g, high(cells), low(cells);
    up[c] += step;
    down[c] = std::max(0.0, g[c] - step);
    solve(up, high, false);
    solve(down, low, false);
    double slope = 0;
    for (size_t k = 0; k < cells; ++k) slope += weight[k] * (high[k] - low[k]) / (up[c] - down[c]);
    worst = std::max(worst, std::abs(slope - found[c]) / scale);
  }
  expect(worst < 1e-4, "gradient against finite differences", worst);
}

}  // namespace

int main() {
  const Resistances usual{1e3, 5, 10, 1e3}, heavy{100, 1e3, 2e4, 500};
  const int64_t sizes[][2] = {{1, 1}, {1, 5}, {5, 1}, {4, 4}, {3, 9}, {9, 3}, {8, 8}, {11, 10}, {7, 17}};
  for (const auto& s : sizes) {
    check(s[0], s[1], usual);
    check(s[0], s[1], heavy);
  }
  // what is no conductance comes back as NaN, without a host check
  Matrix2 bad{1e-5, -1e-6, 1e-5, 1e-5}, out(4);
  with_ladder<double>(2, 2, usual, false, true, [&](const auto& ladder) { ladder.solve(bad.data(), out.data()); });
  expect(std::isnan(out[0]) && std::isnan(out[3]), "a negative conductance gives NaN", out[0]);
  // negative control: another wire is noticed
  Matrix2 g(20), with_ten(20);
  for (auto& v : g) v = uniform(5e-6, 5e-5);
  with_ladder<double>(5, 4, usual, false, true, [&](const auto& ladder) { ladder.solve(g.data(), with_ten.data()); });
  const Matrix2 other = nodal(g, 5, 4, {1e3, 5, 10.01, 1e3});
  double difference = 0;
  for (size_t c = 0; c < 20; ++c) difference = std::max(difference, std::abs(with_ten[c] / other[c] - 1));
  expect(difference > 1e-7, "the oracle notices a wrong wire", difference);
  std::printf(failures ? "%d failures\n" : "ok\n", failures);
  return failures != 0;
}
