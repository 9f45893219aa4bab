// SPDX-License-Identifier: Apache-2.0
// The part of cuSOLVER's interface that zipfast calls, on the host: Householder reduction without blocks, column-major,
// lower triangle, left side.  Arguments that cuSOLVER would refuse give status 3; workspaces must be as long as was told,
// and are written to their end.
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

enum { kSuccess = 0, kNotInitialized = 1, kInvalidValue = 3 };

typedef struct {
  uint64_t magic;
  void* stream;
} Handle;
static const uint64_t kMagic = 0x7a6970666173740a;

// What tests set and read.
int fake_status[6] = {0};  // of create, set stream, the two of sytrd, the two of ormtr
int fake_info = 0;         // of sytrd
double fake_error = 0;     // added to an entry of T
int fake_ormtr_info = 0;
int fake_handles = 0;
void* fake_stream = NULL;  // of the latest call

static int known(const Handle* h) { return h && h->magic == kMagic; }

int cusolverDnCreate(Handle** handle) {
  if (fake_status[0]) return fake_status[0];
  *handle = malloc(sizeof **handle);
  (*handle)->magic = kMagic;
  (*handle)->stream = (void*)-1;
  ++fake_handles;
  return kSuccess;
}

int cusolverDnSetStream(Handle* handle, void* stream) {
  if (!known(handle)) return kNotInitialized;
  if (fake_status[1]) return fake_status[1];
  handle->stream = stream;
  return kSuccess;
}

static int sytrd_arguments(const Handle* h, int uplo, int n, const double* a, int lda) {
  if (!known(h)) return kNotInitialized;
  return uplo == 0 && n >= 0 && a && lda >= n ? kSuccess : kInvalidValue;
}

static int sytrd_work(int n) { return 2 * n + 5; }

int cusolverDnDsytrd_bufferSize(Handle* handle, int uplo, int n, const double* a, int lda, const double* d,
                                const double* e, const double* tau, int* lwork) {
  if (!d || !e || !tau || !lwork) return kInvalidValue;
  *lwork = sytrd_work(n);
  return fake_status[2] ? fake_status[2] : sytrd_arguments(handle, uplo, n, a, lda);
}

int cusolverDnDsytrd(Handle* handle, int uplo, int n, double* a, int lda, double* d, double* e, double* tau,
                     double* work, int lwork, int* info) {
  if (fake_status[3]) return fake_status[3];
  const int status = sytrd_arguments(handle, uplo, n, a, lda);
  if (status) return status;
  if (!d || !e || !tau || !work || !info || lwork != sytrd_work(n)) return kInvalidValue;
  fake_stream = handle->stream;
  for (int i = 0; i < lwork; ++i) work[i] = NAN;
#define A(i, j) a[(size_t)(j) * (size_t)lda + (size_t)(i)]
  for (int j = 0; j + 1 < n; ++j) {
    double rest = 0;
    for (int i = j + 2; i < n; ++i) rest += A(i, j) * A(i, j);
    const double first = A(j + 1, j);
    d[j] = A(j, j);
    if (rest == 0) {
      e[j] = first, tau[j] = 0;
      continue;
    }
    const double beta = -copysign(sqrt(first * first + rest), first);
    e[j] = beta, tau[j] = (beta - first) / beta;
    for (int i = j + 2; i < n; ++i) A(i, j) /= first - beta;
    A(j + 1, j) = 1;
    double dot = 0;  // w = tau A v - tau/2 (tau A v . v) v, of the lower triangle
    for (int i = j + 1; i < n; ++i) {
      work[i] = 0;
      for (int k = j + 1; k < n; ++k) work[i] += (k <= i ? A(i, k) : A(k, i)) * A(k, j);
      work[i] *= tau[j];
      dot += work[i] * A(i, j);
    }
    for (int i = j + 1; i < n; ++i) work[i] -= 0.5 * tau[j] * dot * A(i, j);
    for (int k = j + 1; k < n; ++k)
      for (int i = k; i < n; ++i) A(i, k) -= A(i, j) * work[k] + work[i] * A(k, j);
    A(j + 1, j) = e[j];
  }
  if (n > 0) d[n - 1] = A(n - 1, n - 1), d[n / 2] += fake_error;
  *info = fake_info;
  return kSuccess;
}

static int ormtr_arguments(const Handle* h, int side, int uplo, int trans, int m, int n, const double* a, int lda,
                           const double* tau, const double* c, int ldc) {
  if (!known(h)) return kNotInitialized;
  const int fine = side == 0 && uplo == 0 && (trans == 0 || trans == 1) && m >= 0 && n >= 0 && lda >= m && ldc >= m;
  return fine && a && tau && c ? kSuccess : kInvalidValue;
}

int cusolverDnDormtr_bufferSize(Handle* handle, int side, int uplo, int trans, int m, int n, const double* a, int lda,
                                const double* tau, const double* c, int ldc, int* lwork) {
  *lwork = 3 * n + 1;
  return fake_status[4] ? fake_status[4] : ormtr_arguments(handle, side, uplo, trans, m, n, a, lda, tau, c, ldc);
}

int cusolverDnDormtr(Handle* handle, int side, int uplo, int trans, int m, int n, double* a, int lda, double* tau,
                     double* c, int ldc, double* work, int lwork, int* info) {
  if (fake_status[5]) return fake_status[5];
  const int status = ormtr_arguments(handle, side, uplo, trans, m, n, a, lda, tau, c, ldc);
  if (status) return status;
  if (!work || !info || lwork != 3 * n + 1) return kInvalidValue;
  fake_stream = handle->stream;
  for (int i = 0; i < lwork; ++i) work[i] = NAN;
  for (int step = 0; step + 1 < m; ++step) {
    const int j = trans ? step : m - 2 - step;  // Q = H_0 H_1 ...
    for (int k = 0; k < n; ++k) {
      double* column = c + (size_t)k * (size_t)ldc;
      double dot = column[j + 1];
      for (int i = j + 2; i < m; ++i) dot += A(i, j) * column[i];
      dot *= tau[j];
      column[j + 1] -= dot;
      for (int i = j + 2; i < m; ++i) column[i] -= dot * A(i, j);
    }
  }
  *info = fake_ormtr_info;
  return kSuccess;
}
