/* Fused training kernels for AVX-512 BF16 processors. All tensors are contiguous; "bf" is bfloat16 storage, sums are fp32. */
#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t bf;
#define INL static inline __attribute__((always_inline))

INL float b2f(bf x) { union { uint32_t u; float f; } c; c.u = (uint32_t)x << 16; return c.f; }
INL __m512 ld(const bf *p) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)), 16)); }
INL void st(bf *p, __m512 v) { _mm256_storeu_si256((void *)p, (__m256i)_mm512_cvtneps_pbh(v)); }
INL __m512 set1(float x) { return _mm512_set1_ps(x); }

/* exp, relative error about 2e-7 (degree-6 polynomial after range reduction); arguments below -126 ln 2 flush towards 0 */
INL __m512 vexp(__m512 x) {
    __m512 t = _mm512_mul_ps(x, set1(1.44269504088896341f));
    __m512 n = _mm512_roundscale_ps(t, 8);
    __m512 r = _mm512_sub_ps(t, n);
    __m512 p = set1(1.5403530e-4f);
    p = _mm512_fmadd_ps(p, r, set1(1.3333558e-3f));
    p = _mm512_fmadd_ps(p, r, set1(9.6181291e-3f));
    p = _mm512_fmadd_ps(p, r, set1(5.5504109e-2f));
    p = _mm512_fmadd_ps(p, r, set1(2.4022651e-1f));
    p = _mm512_fmadd_ps(p, r, set1(6.9314718e-1f));
    p = _mm512_fmadd_ps(p, r, set1(1.0f));
    return _mm512_scalef_ps(p, n);
}

/* C[8 x 16 NZ] (+)= A[8 x 2 K2] B, B packed as pairs: B[p][n] holds rows 2p and 2p+1 of column n */
#define MICRO(NZ) \
    static void micro##NZ(int K2, const bf *A, int lda, const int32_t *B, int ldb, float *C, int ldc, int acc) { \
        __m512 c[8][NZ]; \
        _Pragma("GCC unroll 8") for (int i = 0; i < 8; i++) _Pragma("GCC unroll 3") for (int j = 0; j < NZ; j++) \
            c[i][j] = acc ? _mm512_loadu_ps(C + (long)i * ldc + 16 * j) : _mm512_setzero_ps(); \
        for (int p = 0; p < K2; p++) { \
            __m512bh b[NZ]; \
            _Pragma("GCC unroll 3") for (int j = 0; j < NZ; j++) b[j] = (__m512bh)_mm512_loadu_si512(B + (long)p * ldb + 16 * j); \
            _Pragma("GCC unroll 8") for (int i = 0; i < 8; i++) { \
                int32_t w; memcpy(&w, A + (long)i * lda + 2 * p, 4); \
                __m512bh a = (__m512bh)_mm512_set1_epi32(w); \
                _Pragma("GCC unroll 3") for (int j = 0; j < NZ; j++) c[i][j] = _mm512_dpbf16_ps(c[i][j], b[j], a); \
            } \
        } \
        _Pragma("GCC unroll 8") for (int i = 0; i < 8; i++) _Pragma("GCC unroll 3") for (int j = 0; j < NZ; j++) \
            _mm512_storeu_ps(C + (long)i * ldc + 16 * j, c[i][j]); \
    }
MICRO(1)
MICRO(2)
MICRO(3)

/* R: multiple of 8, N: multiple of 16 */
static void gemm(int R, int N, int K2, const bf *A, int lda, const int32_t *B, int ldb, float *C, int ldc, int acc) {
    for (int n = 0; n < N;) {
        int z = (N - n) / 16;
        z = z == 4 ? 2 : (z > 3 ? 3 : z);
        for (int r = 0; r < R; r += 8) {
            const bf *a = A + (long)r * lda;
            float *c = C + (long)r * ldc + n;
            if (z == 3) micro3(K2, a, lda, B + n, ldb, c, ldc, acc);
            else if (z == 2) micro2(K2, a, lda, B + n, ldb, c, ldc, acc);
            else micro1(K2, a, lda, B + n, ldb, c, ldc, acc);
        }
        n += 16 * z;
    }
}

/* rows (T x D) -> transposed pairs (D/2 x T): out[p][t] = (x[t][2p], x[t][2p+1]) */
static void pack_t(int T, int D, const bf *x, int ldx, int32_t *out) {
    int P = D / 2;
    for (int t0 = 0; t0 < T; t0 += 16)
        for (int p = 0; p < P; p++)
            for (int t = t0; t < t0 + 16; t++) memcpy(out + (long)p * T + t, x + (long)t * ldx + 2 * p, 4);
}
/* rows (T x D) -> interleaved row pairs (T/2 x D): out[t/2][d] = (x[t][d], x[t+1][d]) */
static void pack_n(int T, int D, const bf *x, int ldx, int32_t *out) {
    for (int t = 0; t < T; t += 2) {
        const bf *a = x + (long)t * ldx, *b = a + ldx;
        int32_t *o = out + (long)(t / 2) * D;
        for (int d = 0; d < D; d++) o[d] = (int32_t)((uint32_t)a[d] | ((uint32_t)b[d] << 16));
    }
}
/* y = c rope(x / rms(x)), rows at stride ldx; channels i and i + h rotate for i < h, those from 2 h on do not */
static void prep(int T, int D, int h, const bf *x, int ldx, const float *cs, const float *sn, float c, float eps, bf *y) {
    for (int t = 0; t < T; t++, x += ldx, y += D, cs += h, sn += h) {
        float f[256], o[256], s = 0;
        for (int i = 0; i < D; i++) { f[i] = b2f(x[i]); s += f[i] * f[i]; }
        float r = c / sqrtf(s / D + eps);
        for (int i = 0; i < h; i++) {
            float a = f[i] * r, b = f[i + h] * r;
            o[i] = a * cs[i] + b * sn[i];
            o[i + h] = b * cs[i] - a * sn[i];
        }
        for (int i = 2 * h; i < D; i++) o[i] = f[i] * r;
        for (int i = 0; i < D; i += 16) st(y + i, _mm512_loadu_ps(o + i));
    }
}
/* gradient of prep: dy (fp32, element (t, i) at dy[t * rt + i * ri]); returns d/dc */
static float prep_bwd(int T, int D, int h, const bf *x, int ldx, const float *cs, const float *sn, float c, float eps, const float *dy, long rt, long ri, bf *dx) {
    float dc = 0;
    for (int t = 0; t < T; t++, x += ldx, dx += ldx, cs += h, sn += h, dy += rt) {
        float f[256], z[256], s = 0, dot = 0;
        for (int i = 0; i < D; i++) { f[i] = b2f(x[i]); s += f[i] * f[i]; }
        float r = 1 / sqrtf(s / D + eps);
        for (int i = 0; i < h; i++) {
            float a = dy[i * ri], b = dy[(i + h) * ri];
            z[i] = a * cs[i] - b * sn[i];
            z[i + h] = a * sn[i] + b * cs[i];
        }
        for (int i = 2 * h; i < D; i++) z[i] = dy[i * ri];
        for (int i = 0; i < D; i++) { f[i] *= r; dot += z[i] * f[i]; }
        dc += dot;
        float m = dot / D, k = c * r;
        for (int i = 0; i < D; i++) z[i] = k * (z[i] - f[i] * m);
        for (int i = 0; i < D; i += 16) st(dx + i, _mm512_loadu_ps(z + i));
    }
    return dc;
}

#define R 32
static void *grab(char **p, size_t n) { void *r = *p; *p += (n + 63) & ~(size_t)63; return r; }
static char *arena(size_t n) { void *p = NULL; if (posix_memalign(&p, 4096, n)) abort(); return p; }

/* qkv (B, T, (H + 2 G) D); cs, sn (T, J); gain (H); first (B, T), the first key of each query, or NULL for 0; out
   (B, T, H, D); lse (B, H, T). T multiple of 32, D multiple of 16 up to 256, J at most D / 2. */
void attn_fwd(int B, int T, int H, int G, int D, int J, const bf *qkv, const float *cs, const float *sn, const float *gain, const int32_t *first, float eps, bf *out, float *lse) {
    int W = (H + 2 * G) * D, rep = H / G;
    float scale = 1 / sqrtf(D);
#pragma omp parallel
    {
        size_t n = (size_t)T * D * 8 + (size_t)R * T * 6 + R * D * 4 + 1024;
        char *mem = arena(n), *p = mem;
        bf *q = grab(&p, (size_t)T * D * 2);
        int32_t *kp = grab(&p, (size_t)T * D * 2), *vp = grab(&p, (size_t)T * D * 2);
        float *S = grab(&p, (size_t)R * T * 4), *O = grab(&p, R * D * 4);
        bf *P = grab(&p, (size_t)R * T * 2);
#pragma omp for schedule(dynamic, 1)
        for (int bg = 0; bg < B * G; bg++) {
            int b = bg / G, g = bg % G;
            const bf *x = qkv + (long)b * T * W;
            prep(T, D, J, x + (H + g) * D, W, cs, sn, 1.0f, eps, q);
            pack_t(T, D, q, D, kp);
            pack_n(T, D, x + (H + G + g) * D, W, vp);
            for (int h = g * rep; h < (g + 1) * rep; h++) {
                prep(T, D, J, x + h * D, W, cs, sn, gain[h] * scale, eps, q);
                for (int i0 = 0; i0 < T; i0 += R) {
                    int N = i0 + R;
                    gemm(R, N, D / 2, q + (long)i0 * D, D, kp, T, S, T, 0);
                    float inv[R];
                    for (int i = 0; i < R; i++) {
                        float *s = S + (long)i * T;
                        bf *pr = P + (long)i * T;
                        int lim = i0 + i + 1;
                        for (int j = lim; j < N; j++) s[j] = -1e30f;
                        for (int j = first ? first[(long)b * T + i0 + i] : 0; j-- > 0;) s[j] = -1e30f;
                        __m512 m = set1(-INFINITY), sum = _mm512_setzero_ps();
                        for (int j = 0; j < N; j += 16) m = _mm512_max_ps(m, _mm512_loadu_ps(s + j));
                        float mx = _mm512_reduce_max_ps(m);
                        m = set1(mx);
                        for (int j = 0; j < N; j += 16) {
                            __m512 e = vexp(_mm512_sub_ps(_mm512_loadu_ps(s + j), m));
                            sum = _mm512_add_ps(sum, e);
                            st(pr + j, e);
                        }
                        float l = _mm512_reduce_add_ps(sum);
                        inv[i] = 1 / l;
                        lse[((long)b * H + h) * T + i0 + i] = mx + logf(l);
                    }
                    gemm(R, D, N / 2, P, T, vp, D, O, D, 0);
                    for (int i = 0; i < R; i++) {
                        bf *o = out + (((long)b * T + i0 + i) * H + h) * D;
                        for (int d = 0; d < D; d += 16) st(o + d, _mm512_mul_ps(_mm512_loadu_ps(O + (long)i * D + d), set1(inv[i])));
                    }
                }
            }
        }
        free(mem);
    }
}

/* dqkv like qkv; dgain (B, H): one value a head and row, so that the caller sums them in a fixed order */
void attn_bwd(int B, int T, int H, int G, int D, int J, const bf *qkv, const float *cs, const float *sn, const float *gain, const int32_t *first, float eps, const bf *out, const float *lse, const bf *dout, bf *dqkv, float *dgain) {
    int W = (H + 2 * G) * D, rep = H / G;
    float scale = 1 / sqrtf(D);
#pragma omp parallel
    {
        size_t td = (size_t)T * D, n = td * (2 * 3 + 2 * 4 + 4 * 3) + (size_t)R * T * (4 * 2 + 2 * 3) + T * 8 + 4096;
        char *mem = arena(n), *p = mem;
        bf *q = grab(&p, td * 2), *k = grab(&p, td * 2), *kt = grab(&p, td * 2);
        int32_t *qp = grab(&p, td * 2), *qn = grab(&p, td * 2), *op = grab(&p, td * 2), *on = grab(&p, td * 2);
        float *dk = grab(&p, td * 4), *dv = grab(&p, td * 4), *dqt = grab(&p, td * 4);
        float *S = grab(&p, (size_t)R * T * 4), *dP = grab(&p, (size_t)R * T * 4);
        bf *P = grab(&p, (size_t)R * T * 2), *dS = grab(&p, (size_t)R * T * 2);
        int32_t *dSn = grab(&p, (size_t)R * T * 2);
        float *delta = grab(&p, T * 4);
        int32_t *end = grab(&p, T * 4); /* of each key: the first query after it that does not see it */
#pragma omp for schedule(dynamic, 1)
        for (int bg = 0; bg < B * G; bg++) {
            int b = bg / G, g = bg % G;
            const bf *x = qkv + (long)b * T * W, *v = x + (H + G + g) * D;
            bf *dx = dqkv + (long)b * T * W;
            prep(T, D, J, x + (H + g) * D, W, cs, sn, 1.0f, eps, k);
            for (int t = 0; t < T; t++) for (int d = 0; d < D; d++) kt[(long)d * T + t] = k[(long)t * D + d];
            memset(dk, 0, td * 4);
            memset(dv, 0, td * 4);
            end[T - 1] = T;
            for (int t = T - 1; t > 0; t--) end[t - 1] = first && first[(long)b * T + t] == t ? t : end[t];
            for (int h = g * rep; h < (g + 1) * rep; h++) {
                const bf *o = out + ((long)b * T * H + h) * D, *go = dout + ((long)b * T * H + h) * D;
                const float *L = lse + ((long)b * H + h) * T;
                prep(T, D, J, x + h * D, W, cs, sn, gain[h] * scale, eps, q);
                pack_t(T, D, q, D, qp);
                pack_n(T, D, q, D, qn);
                pack_t(T, D, go, H * D, op);
                pack_n(T, D, go, H * D, on);
                for (int t = 0; t < T; t++) {
                    __m512 a = _mm512_setzero_ps();
                    for (int d = 0; d < D; d += 16) a = _mm512_fmadd_ps(ld(o + (long)t * H * D + d), ld(go + (long)t * H * D + d), a);
                    delta[t] = _mm512_reduce_add_ps(a);
                }
                memset(dqt, 0, td * 4);
                for (int j0 = 0; j0 < T; j0 += R) {
                    int N = T - j0;
                    gemm(R, N, D / 2, k + (long)j0 * D, D, qp + j0, T, S, N, 0);
                    gemm(R, N, D / 2, v + (long)j0 * W, W, op + j0, T, dP, N, 0);
                    for (int j = 0; j < R; j += 2) {
                        for (int i = 0; i < N; i += 16) {
                            __m512 l = _mm512_loadu_ps(L + j0 + i), de = _mm512_loadu_ps(delta + j0 + i), ds[2];
                            for (int u = 0; u < 2; u++) {
                                long at = (long)(j + u) * N + i;
                                __m512 e = vexp(_mm512_sub_ps(_mm512_loadu_ps(S + at), l));
                                int hidden = j + u - i; /* queries before the key see nothing of it */
                                if (hidden > 0) e = _mm512_maskz_mov_ps(hidden >= 16 ? 0 : (__mmask16)(0xffffu << hidden), e);
                                int seen = end[j0 + j + u] - j0 - i; /* nor do those of later documents */
                                if (seen < 16) e = _mm512_maskz_mov_ps(seen <= 0 ? 0 : (__mmask16)(0xffffu >> (16 - seen)), e);
                                ds[u] = _mm512_mul_ps(e, _mm512_sub_ps(_mm512_loadu_ps(dP + at), de));
                                st(P + at, e);
                                st(dS + at, ds[u]);
                            }
                            __m512i lo = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(ds[0]));
                            __m512i hi = _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(ds[1])), 16);
                            _mm512_storeu_si512(dSn + (long)(j / 2) * N + i, _mm512_or_si512(lo, hi));
                        }
                    }
                    gemm(R, D, N / 2, P, N, on + (long)(j0 / 2) * D, D, dv + (long)j0 * D, D, 1);
                    gemm(R, D, N / 2, dS, N, qn + (long)(j0 / 2) * D, D, dk + (long)j0 * D, D, 1);
                    gemm(D, N, R / 2, kt + j0, T, dSn, N, dqt + j0, T, 1);
                }
                float dc = prep_bwd(T, D, J, x + h * D, W, cs, sn, gain[h] * scale, eps, dqt, 1, T, dx + h * D) * scale;
                dgain[(long)b * H + h] = dc;
            }
            prep_bwd(T, D, J, x + (H + g) * D, W, cs, sn, 1.0f, eps, dk, D, 1, dx + (H + g) * D);
            for (int t = 0; t < T; t++)
                for (int d = 0; d < D; d += 16) st(dx + (long)t * W + (H + G + g) * D + d, _mm512_loadu_ps(dv + (long)t * D + d));
        }
        free(mem);
    }
}

/* x = sum_k c_k * in_k (c_k (d) fp32, or NULL for 1), n = x / rms(x); x or n may be NULL (not wanted). rstd (N).
   d multiple of 16 up to 4096. */
void mix_fwd(int N, int d, int K, const bf **in, const float **c, float eps, bf *x, bf *n, float *rstd) {
#pragma omp parallel for schedule(static)
    for (int t = 0; t < N; t++) {
        float f[4096];
        long o = (long)t * d;
        __m512 s = _mm512_setzero_ps();
        for (int i = 0; i < d; i += 16) {
            __m512 a = ld(in[0] + o + i);
            if (c[0]) a = _mm512_mul_ps(a, _mm512_loadu_ps(c[0] + i));
            for (int k = 1; k < K; k++) {
                __m512 y = ld(in[k] + o + i);
                a = c[k] ? _mm512_fmadd_ps(y, _mm512_loadu_ps(c[k] + i), a) : _mm512_add_ps(y, a);
            }
            _mm512_storeu_ps(f + i, a);
            s = _mm512_fmadd_ps(a, a, s);
        }
        float r = 1 / sqrtf(_mm512_reduce_add_ps(s) / d + eps);
        rstd[t] = r;
        for (int i = 0; i < d; i += 16) {
            __m512 a = _mm512_loadu_ps(f + i);
            if (x) st(x + o + i, a);
            if (n) st(n + o + i, _mm512_mul_ps(a, set1(r)));
        }
    }
}
/* gx, gn: gradients of x and n (NULL = none). din[k] (N, d) and dc[k] (d) are written where not NULL. xs: x as stored.
   Sums over rows are added up in the order of the threads, so they are the same in every run. */
void mix_bwd(int N, int d, int K, const bf **in, const float **c, const bf *xs, const float *rstd, const bf *gx, const bf *gn, bf **din, float **dc) {
    int most = omp_get_max_threads(), used = 1;
    float *all = calloc((size_t)most * K * d, 4);
    if (!all) abort();
#pragma omp parallel num_threads(most)
    {
        float f[4096], *acc = all + (size_t)omp_get_thread_num() * K * d;
#pragma omp single
        used = omp_get_num_threads();
#pragma omp for schedule(static)
        for (int t = 0; t < N; t++) {
            long o = (long)t * d;
            float r = rstd[t], m = 0;
            if (gn) {
                __m512 s = _mm512_setzero_ps();
                for (int i = 0; i < d; i += 16) s = _mm512_fmadd_ps(ld(gn + o + i), ld(xs + o + i), s);
                m = _mm512_reduce_add_ps(s) * r * r * r / d;
            }
            for (int i = 0; i < d; i += 16) {
                __m512 a = gx ? ld(gx + o + i) : _mm512_setzero_ps();
                if (gn) a = _mm512_fnmadd_ps(ld(xs + o + i), set1(m), _mm512_fmadd_ps(ld(gn + o + i), set1(r), a));
                _mm512_storeu_ps(f + i, a);
            }
            for (int k = 0; k < K; k++) {
                float *sum = acc + (size_t)k * d;
                for (int i = 0; i < d; i += 16) {
                    __m512 a = _mm512_loadu_ps(f + i);
                    if (din[k]) st(din[k] + o + i, c[k] ? _mm512_mul_ps(a, _mm512_loadu_ps(c[k] + i)) : a);
                    if (dc[k]) _mm512_storeu_ps(sum + i, _mm512_fmadd_ps(a, ld(in[k] + o + i), _mm512_loadu_ps(sum + i)));
                }
            }
        }
    }
    for (int k = 0; k < K; k++)
        for (int i = 0; dc[k] && i < d; i++) {
            float s = 0;
            for (int t = 0; t < used; t++) s += all[((size_t)t * K + k) * d + i];
            dc[k][i] = s;
        }
    free(all);
}

/* y = f(u)^2 with f(u) = u for u > 0, else slope u; n multiple of 16 */
void square_fwd(long n, float slope, const bf *u, bf *y) {
#pragma omp parallel for schedule(static)
    for (long i = 0; i < n; i += 16) {
        __m512 a = ld(u + i);
        a = _mm512_mask_mul_ps(a, _mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_LE_OQ), a, set1(slope));
        st(y + i, _mm512_mul_ps(a, a));
    }
}
void square_bwd(long n, float slope, const bf *u, const bf *dy, bf *du) {
#pragma omp parallel for schedule(static)
    for (long i = 0; i < n; i += 16) {
        __m512 a = ld(u + i);
        a = _mm512_mask_mul_ps(a, _mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_LE_OQ), a, set1(slope * slope));
        st(du + i, _mm512_mul_ps(_mm512_add_ps(a, a), ld(dy + i)));
    }
}

/* logits z (N, V) bf16, V multiple of 16 up to 8192; y = cap tanh(z / cap); nll (N) fp32; target -1: nll 0, gradient 0.
   With grad, z is replaced by d(weight * sum nll)/dz. */
void softcap_ce(int N, int V, bf *z, const int64_t *target, float cap, float weight, float *nll, int grad) {
#pragma omp parallel
    {
        float *e = malloc((size_t)V * 8), *u = e + V;
#pragma omp for schedule(static)
        for (int t = 0; t < N; t++) {
            bf *row = z + (long)t * V;
            long k = target[t];
            if (k >= V) { nll[t] = NAN; if (grad) memset(row, 0xff, (size_t)V * 2); continue; } /* never read outside the row */
            if (k < 0) { nll[t] = 0; if (grad) memset(row, 0, (size_t)V * 2); continue; }
            __m512 s = _mm512_setzero_ps(), two = set1(2.0f), one = set1(1.0f), vc = set1(cap);
            for (int i = 0; i < V; i += 16) {
                __m512 a = vexp(_mm512_min_ps(_mm512_mul_ps(ld(row + i), set1(2.0f / cap)), set1(40.0f)));
                a = _mm512_sub_ps(one, _mm512_div_ps(two, _mm512_add_ps(a, one)));
                _mm512_storeu_ps(u + i, a);
                a = vexp(_mm512_fmsub_ps(a, vc, vc));
                _mm512_storeu_ps(e + i, a);
                s = _mm512_add_ps(s, a);
            }
            float sum = _mm512_reduce_add_ps(s);
            nll[t] = logf(sum) + cap - cap * u[k];
            if (!grad) continue;
            __m512 inv = set1(weight / sum), w = set1(weight);
            for (int i = 0; i < V; i += 16) {
                __m512 a = _mm512_loadu_ps(u + i), g = _mm512_mul_ps(_mm512_loadu_ps(e + i), inv);
                int at = (int)(k - i);
                if (at >= 0 && at < 16) g = _mm512_mask_sub_ps(g, (__mmask16)(1u << at), g, w);
                st(row + i, _mm512_mul_ps(g, _mm512_fnmadd_ps(a, a, one)));
            }
        }
        free(e);
    }
}
