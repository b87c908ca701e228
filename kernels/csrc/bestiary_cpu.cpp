// The one translation unit: the ops of namespace bestiary_<isa> on libtorch's stable ABI.
//
// Every op writes into tensors that its caller has made; shapes and dtypes are checked in Python (kernels/*/cpu.py).
#include "conv.h"
#include "mamba2_decode.h"
#include "norm.h"
#include "roof.h"
#include "scan.h"
#include "scan_backward.h"
#include "ssd.h"
#include "ssd_backward.h"
#include "step.h"

namespace bestiary {

void scan_forward_op(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
                     const MaybeTensor& D, const MaybeTensor& z, const MaybeTensor& bias, const MaybeTensor& h0,
                     const MaybeTensor& seq, const MaybeTensor& order, bool softplus, bool reverse, const Tensor& out,
                     const Tensor& last, const MaybeTensor& saved) {
  Scan s(u, delta, A, B, C, D, z, bias, h0, seq, order, softplus, reverse);
  scan_forward(s, Array(out), Array(last), saved.has_value() ? static_cast<float*>(saved->data_ptr()) : nullptr);
}

void scan_backward_op(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
                      const MaybeTensor& D, const MaybeTensor& z, const MaybeTensor& bias, const MaybeTensor& h0,
                      const MaybeTensor& seq, const MaybeTensor& order, bool softplus, bool reverse,
                      const Tensor& dout, const MaybeTensor& dlast, const Tensor& saved, const MaybeTensor& du,
                      const MaybeTensor& ddelta, const MaybeTensor& dA, const MaybeTensor& dB, const MaybeTensor& dC,
                      const MaybeTensor& dD, const MaybeTensor& dz, const MaybeTensor& dbias, const MaybeTensor& dh0) {
  Scan s(u, delta, A, B, C, D, z, bias, h0, seq, order, softplus, reverse);
  ScanGrads grads{Array(dout), Array(dlast), Array(du), Array(ddelta), Array(dz), Array(dA),
                  Array(dD),   Array(dbias), Array(dh0), Array(dB),     Array(dC)};
  scan_backward(s, grads, static_cast<const float*>(saved.data_ptr()));
}

void conv_forward_op(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& initial,
                     const MaybeTensor& seq, const MaybeTensor& order, bool silu, bool reverse, const Tensor& out) {
  conv_forward(Conv(x, weight, bias, initial, seq, order, silu, reverse), Array(out));
}

void conv_backward_op(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& initial,
                      const MaybeTensor& seq, const MaybeTensor& order, bool silu, bool reverse, const Tensor& dout,
                      const MaybeTensor& dfinal, const MaybeTensor& dx, const MaybeTensor& dweight,
                      const MaybeTensor& dbias, const MaybeTensor& dinitial) {
  ConvGrads grads{Array(dout), Array(dfinal), Array(dx), Array(dweight), Array(dbias), Array(dinitial)};
  conv_backward(Conv(x, weight, bias, initial, seq, order, silu, reverse), grads);
}

void ssd_forward_op(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
                    const MaybeTensor& D, const MaybeTensor& bias, const MaybeTensor& initial, const MaybeTensor& seq,
                    const MaybeTensor& order, bool softplus, double low, double high, bool reverse, const Tensor& out,
                    const Tensor& last, const MaybeTensor& saved) {
  Ssd s(x, dt, A, B, C, D, bias, initial, seq, order, softplus, low, high, reverse);
  ssd_forward(s, Array(out), Array(last), saved.has_value() ? static_cast<float*>(saved->data_ptr()) : nullptr);
}

void ssd_backward_op(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
                     const MaybeTensor& D, const MaybeTensor& bias, const MaybeTensor& initial, const MaybeTensor& seq,
                     const MaybeTensor& order, bool softplus, double low, double high, bool reverse,
                     const Tensor& dout, const MaybeTensor& dlast, const Tensor& saved, const MaybeTensor& dx,
                     const MaybeTensor& ddt, const MaybeTensor& dA, const MaybeTensor& dB, const MaybeTensor& dC,
                     const MaybeTensor& dD, const MaybeTensor& dbias, const MaybeTensor& dinitial) {
  Ssd s(x, dt, A, B, C, D, bias, initial, seq, order, softplus, low, high, reverse);
  SsdGrads grads{Array(dout), Array(dlast), Array(dx), Array(ddt),   Array(dA),
                 Array(dB),   Array(dC),    Array(dD), Array(dbias), Array(dinitial)};
  ssd_backward(s, grads, static_cast<const float*>(saved.data_ptr()));
}

void state_update_op(const Tensor& state, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                     const Tensor& C, const MaybeTensor& D, const MaybeTensor& z, const MaybeTensor& bias,
                     bool softplus, const MaybeTensor& slots, const Tensor& out) {
  state_update({Array(state), Array(x), Array(dt), Array(A), Array(B), Array(C), Array(D), Array(z), Array(bias),
                Array(out), Ints(slots), softplus});
}

void conv_update_op(const Tensor& x, const Tensor& state, const Tensor& weight, const MaybeTensor& bias, bool silu,
                    const MaybeTensor& lengths, const MaybeTensor& slots, const Tensor& out) {
  conv_update({Array(x), Array(state), Array(weight), Array(bias), Array(out), Ints(lengths), Ints(slots), silu});
}

void gated_norm_forward_op(const Tensor& x, const Tensor& weight, const MaybeTensor& z, double eps, int64_t size,
                           bool norm_first, const Tensor& out) {
  gated_norm_forward(GatedNorm(Array(x), Array(weight), Array(z), x.dim() - 1, eps, size, norm_first), Array(out));
}

void gated_norm_backward_op(const Tensor& x, const Tensor& weight, const MaybeTensor& z, double eps, int64_t size,
                            bool norm_first, const Tensor& dout, const MaybeTensor& dx, const MaybeTensor& dweight,
                            const MaybeTensor& dz) {
  gated_norm_backward(GatedNorm(Array(x), Array(weight), Array(z), x.dim() - 1, eps, size, norm_first),
                      {Array(dout), Array(dx), Array(dweight), Array(dz)});
}

void mamba2_step_op(const Tensor& zxbcdt, const Tensor& conv_state, const Tensor& ssm_state, const Tensor& conv_weight,
                    const MaybeTensor& conv_bias, const Tensor& dt_bias, const Tensor& A, const Tensor& D,
                    const Tensor& norm_weight, const MaybeTensor& rows, int64_t groups, double eps, double low, double high,
                    const Tensor& out) {
  mamba2_step({Array(zxbcdt), Array(conv_state), Array(ssm_state), Array(conv_weight), Array(conv_bias), Array(dt_bias),
               Array(A), Array(D), Array(norm_weight), Array(out), Ints(rows), groups, (float)eps, (float)low, (float)high});
}

double roof_op(int64_t kind, int64_t n) { return roof(kind, n); }

}  // namespace bestiary

// Through one more macro, so that the namespace is expanded before its name is pasted.
#define BK_LIBRARY(ns, m) STABLE_TORCH_LIBRARY(ns, m)
#define BK_IMPL(ns, key, m) STABLE_TORCH_LIBRARY_IMPL(ns, key, m)
#define BK_SCAN_INPUTS                                                                                          \
  "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? bias, Tensor? h0, "      \
  "Tensor? seq, Tensor? order, bool softplus, bool reverse, "
#define BK_SSD_INPUTS                                                                                        \
  "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? bias, Tensor? initial, Tensor? seq, " \
  "Tensor? order, bool softplus, float low, float high, bool reverse, "
#define BK_CONV_INPUTS \
  "Tensor x, Tensor weight, Tensor? bias, Tensor? initial, Tensor? seq, Tensor? order, bool silu, bool reverse, "
#define BK_NORM_INPUTS "Tensor x, Tensor weight, Tensor? z, float eps, int size, bool norm_first, "

BK_LIBRARY(BESTIARY_NAMESPACE, m) {
  m.def("scan_forward(" BK_SCAN_INPUTS "Tensor(a!) out, Tensor(b!) last, Tensor(c!)? saved) -> ()");
  m.def("scan_backward(" BK_SCAN_INPUTS
        "Tensor dout, Tensor? dlast, Tensor saved, Tensor(a!)? du, Tensor(b!)? ddelta, Tensor(c!)? dA, "
        "Tensor(d!)? dB, Tensor(e!)? dC, Tensor(f!)? dD, Tensor(g!)? dz, Tensor(h!)? dbias, Tensor(i!)? dh0) -> ()");
  m.def("conv_forward(" BK_CONV_INPUTS "Tensor(a!) out) -> ()");
  m.def("conv_backward(" BK_CONV_INPUTS
        "Tensor dout, Tensor? dfinal, Tensor(a!)? dx, Tensor(b!)? dweight, Tensor(c!)? dbias, Tensor(d!)? dinitial"
        ") -> ()");
  m.def("ssd_forward(" BK_SSD_INPUTS "Tensor(a!) out, Tensor(b!) last, Tensor(c!)? saved) -> ()");
  m.def("ssd_backward(" BK_SSD_INPUTS
        "Tensor dout, Tensor? dlast, Tensor saved, Tensor(a!)? dx, Tensor(b!)? ddt, Tensor(c!)? dA, Tensor(d!)? dB, "
        "Tensor(e!)? dC, Tensor(f!)? dD, Tensor(g!)? dbias, Tensor(h!)? dinitial) -> ()");
  m.def(
      "state_update(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
      "Tensor? bias, bool softplus, Tensor? slots, Tensor(b!) out) -> ()");
  m.def(
      "conv_update(Tensor x, Tensor(a!) state, Tensor weight, Tensor? bias, bool silu, Tensor? lengths, "
      "Tensor? slots, Tensor(b!) out) -> ()");
  m.def("gated_norm_forward(" BK_NORM_INPUTS "Tensor(a!) out) -> ()");
  m.def("gated_norm_backward(" BK_NORM_INPUTS
        "Tensor dout, Tensor(a!)? dx, Tensor(b!)? dweight, Tensor(c!)? dz) -> ()");
  m.def(
      "mamba2_step(Tensor zxbcdt, Tensor(a!) conv_state, Tensor(b!) ssm_state, Tensor conv_weight, Tensor? conv_bias, "
      "Tensor dt_bias, Tensor A, Tensor D, Tensor norm_weight, Tensor? rows, int groups, float eps, float low, "
      "float high, Tensor(c!) out) -> ()");
  m.def("roof(int kind, int n) -> float");
}

BK_IMPL(BESTIARY_NAMESPACE, CPU, m) {
  m.impl("scan_forward", TORCH_BOX(&bestiary::scan_forward_op));
  m.impl("scan_backward", TORCH_BOX(&bestiary::scan_backward_op));
  m.impl("conv_forward", TORCH_BOX(&bestiary::conv_forward_op));
  m.impl("conv_backward", TORCH_BOX(&bestiary::conv_backward_op));
  m.impl("ssd_forward", TORCH_BOX(&bestiary::ssd_forward_op));
  m.impl("ssd_backward", TORCH_BOX(&bestiary::ssd_backward_op));
  m.impl("state_update", TORCH_BOX(&bestiary::state_update_op));
  m.impl("conv_update", TORCH_BOX(&bestiary::conv_update_op));
  m.impl("gated_norm_forward", TORCH_BOX(&bestiary::gated_norm_forward_op));
  m.impl("gated_norm_backward", TORCH_BOX(&bestiary::gated_norm_backward_op));
  m.impl("mamba2_step", TORCH_BOX(&bestiary::mamba2_step_op));
}

// no tensor among its arguments, so no device to dispatch on
BK_IMPL(BESTIARY_NAMESPACE, CompositeExplicitAutograd, m) { m.impl("roof", TORCH_BOX(&bestiary::roof_op)); }
